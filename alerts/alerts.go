// Package alerts holds the rule files of this directory, for programs that run them, such
// as the drill of cmd/ringfence.
package alerts

import (
	"embed"
	"io/fs"
	"path"
)

//go:embed *.rules.yml
var files embed.FS

// Rules returns the rule files by name, all there are.
func Rules() map[string]string {
	out := map[string]string{}
	names, err := fs.Glob(files, "*.rules.yml")
	if err != nil {
		panic(err) // the pattern is a constant
	}
	for _, name := range names {
		text, err := files.ReadFile(name)
		if err != nil {
			panic(err) // it was embedded
		}
		out[path.Base(name)] = string(text)
	}
	return out
}
