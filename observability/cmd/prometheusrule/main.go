// Command prometheusrule writes a file of rules as a PrometheusRule of the Prometheus
// operator.
package main

import (
	"fmt"
	"os"
	"strings"
)

const head = `# Made from ringfence.rules.yml by "go generate" in observability/: change that file.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ringfence
  labels:
    app.kubernetes.io/name: ringfence
spec:
`

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: prometheusrule RULES OUT")
		os.Exit(2)
	}
	if err := write(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "prometheusrule:", err)
		os.Exit(1)
	}
}

func write(in, out string) error {
	text, err := os.ReadFile(in)
	if err != nil {
		return err
	}
	_, groups, found := strings.Cut(string(text), "\ngroups:\n")
	if !found {
		return fmt.Errorf("%s has no line %q", in, "groups:")
	}
	var b strings.Builder
	b.WriteString(head)
	for line := range strings.Lines("groups:\n" + groups) {
		if line != "\n" {
			b.WriteString("  ")
		}
		b.WriteString(line)
	}
	return os.WriteFile(out, []byte(b.String()), 0o644)
}
