// Command dashboards writes the dashboards as JSON files into a directory.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/ringfence/ringfence/observability"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: dashboards DIRECTORY")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "dashboards:", err)
		os.Exit(1)
	}
}

func write(dir string) error {
	for _, d := range observability.All() {
		text, err := d.JSON()
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, d.File), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}
