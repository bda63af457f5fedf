//go:build pictures

package observability_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestPictures draws each dashboard in a calm and in an incident hour of the fixture into
// ../docs. It needs Node.js, npm and Chromium, and is run by `make pictures` only.
func TestPictures(t *testing.T) {
	render, err := filepath.Abs("render")
	if err != nil {
		t.Fatal(err)
	}
	run := func(name string, args ...string) {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = render
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		t.Logf("%s", out)
	}
	if _, err := os.Stat(filepath.Join(render, "node_modules")); err != nil {
		// Exact versions stand in package.json. A lock file would name the registry that it
		// was made with.
		run("npm", "install", "--package-lock=false", "--legacy-peer-deps", "--ignore-scripts", "--no-audit", "--no-fund")
	}
	run("node_modules/.bin/esbuild", "app.jsx", "--bundle", "--minify", "--outfile=node_modules/.app.js", "--log-level=error",
		"--loader:.css=text", "--loader:.svg=text", `--define:process.env.NODE_ENV="production"`)

	type shot struct {
		Dashboard string `json:"dashboard"`
		From      int    `json:"from"`
		To        int    `json:"to"`
		Title     string `json:"title"`
		Out       string `json:"out"`
	}
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatal(err)
	}
	var jobs struct {
		Prometheus string `json:"prometheus"`
		Chromium   string `json:"chromium"`
		Shots      []shot `json:"shots"`
	}
	jobs.Prometheus, jobs.Chromium = startHistory(t).url, chromium
	for _, b := range boards(t) {
		for _, hour := range []struct {
			name, title string
			from        int
		}{{"calm", "a calm hour", 2*3600 - 540}, {"incident", "an incident: shard eu-2 turns slow", slowFrom - 1740}} {
			dashboard, _ := filepath.Abs(filepath.Join(dashboards, b.file))
			out, _ := filepath.Abs("../docs/" + strings.TrimSuffix(b.file, ".json") + "-" + hour.name + ".png")
			jobs.Shots = append(jobs.Shots, shot{dashboard, fixtureStart + hour.from, fixtureStart + hour.from + 3600, hour.title, out})
		}
	}
	text, err := json.Marshal(jobs)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "jobs.json")
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
	run("node", "shot.mjs", file)
	for _, s := range jobs.Shots {
		shrink(t, s.Out)
	}
}
