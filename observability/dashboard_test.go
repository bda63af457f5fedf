package observability_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/promql/parser"

	"github.com/ringfence/ringfence/observability"
)

const dashboards = "../dashboards"

// board is a dashboard as it is on disk: only what the tests look at.
type board struct {
	file        string
	raw         map[string]any
	UID         string
	Title       string
	Panels      []boardPanel
	Templating  struct{ List []boardVariable }
	Annotations struct {
		List []struct{ Name, Expr, TitleFormat, TextFormat string }
	}
}

type boardPanel struct {
	ID                       int
	Type, Title, Description string
	GridPos                  struct{ X, Y, W, H int }
	Targets                  []struct{ RefID, Expr, LegendFormat string }
	Collapsed                bool
	Panels                   []boardPanel // of a row that is folded
	FieldConfig              struct {
		Defaults struct {
			Unit, NoValue string
			Custom        struct{ ScaleDistribution struct{ Type string } }
		}
	}
}

type boardVariable struct {
	Name, Type, Label, Definition, AllValue string
	Multi, IncludeAll                       bool
	Current                                 map[string]any
}

func boards(t testing.TB) []board {
	t.Helper()
	files, err := filepath.Glob(dashboards + "/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no dashboards: %v", err)
	}
	var all []board
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		b := board{file: filepath.Base(f)}
		if err := json.Unmarshal(text, &b); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		if err := json.Unmarshal(text, &b.raw); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		for i := 0; i < len(b.Panels); i++ {
			b.Panels = slices.Insert(b.Panels, i+1, b.Panels[i].Panels...)
		}
		all = append(all, b)
	}
	return all
}

func TestTheCommittedDashboardsAreWhatTheCodeMakes(t *testing.T) {
	made := map[string]bool{}
	for _, d := range observability.All() {
		made[d.File] = true
		want, err := d.JSON()
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(dashboards, d.File))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs: run go generate in observability/", d.File)
		}
	}
	for _, b := range boards(t) {
		if !made[b.file] {
			t.Errorf("%s is not in All()", b.file)
		}
	}
}

func TestADashboardImportsIntoAnyGrafana(t *testing.T) {
	uids := map[string]string{}
	for _, b := range boards(t) {
		for _, key := range []string{"__inputs", "__requires", "id", "version", "gnetId"} {
			if _, ok := b.raw[key]; ok {
				t.Errorf("%s has %q: it belongs to one Grafana, or is never filled in by provisioning", b.file, key)
			}
		}
		if len(b.UID) == 0 || len(b.UID) > 40 {
			t.Errorf("%s: uid %q must have 1 to 40 characters", b.file, b.UID)
		}
		if other, taken := uids[b.UID]; taken {
			t.Errorf("%s and %s have the uid %s", b.file, other, b.UID)
		}
		uids[b.UID] = b.file
		for key, want := range map[string]any{"editable": false, "graphTooltip": 1.0, "timezone": "utc", "schemaVersion": 42.0} {
			if b.raw[key] != want {
				t.Errorf("%s: %s is %v, want %v", b.file, key, b.raw[key], want)
			}
		}
		if tags, _ := b.raw["tags"].([]any); !slices.Contains(tags, any("ringfence")) {
			t.Errorf("%s lacks the tag ringfence", b.file)
		}
		datasources := 0
		walk(b.raw, func(key string, v any) {
			if key != "datasource" {
				return
			}
			datasources++
			if m, _ := v.(map[string]any); m["uid"] != "${datasource}" || m["type"] != "prometheus" {
				t.Errorf("%s names the data source %v", b.file, v)
			}
		})
		want := len(b.Annotations.List) + len(b.Templating.List) - 1 // the first is the data source itself
		for _, p := range b.Panels {
			if p.Type != "row" {
				want += 1 + len(p.Targets)
			}
		}
		if datasources != want {
			t.Errorf("%s names %d data sources, want %d: one each for panels, targets, variables and annotations", b.file, datasources, want)
		}
	}
}

// walk visits every key of a JSON value.
func walk(v any, visit func(key string, v any)) {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			visit(k, x)
			walk(x, visit)
		}
	case []any:
		for _, x := range v {
			walk(x, visit)
		}
	}
}

func TestADashboardCanBeNarrowedByJobInstanceAndShard(t *testing.T) {
	for _, b := range boards(t) {
		var names []string
		for _, v := range b.Templating.List {
			names = append(names, v.Name)
			if v.Label == "" || v.Current == nil {
				t.Errorf("%s: variable %s lacks a label or a current value", b.file, v.Name)
			}
			if v.Type == "query" && (!v.Multi || !v.IncludeAll || v.AllValue != ".+") {
				t.Errorf("%s: variable %s must allow several values and all of them", b.file, v.Name)
			}
		}
		want := []string{"datasource", "job", "instance", "shard_id"}
		if b.UID == "ringfence-limits" {
			want = append(want, "limit")
		}
		if !slices.Equal(names, want) {
			t.Errorf("%s has the variables %v, want %v", b.file, names, want)
		}
	}
}

var (
	panelTypes = []string{"row", "stat", "timeseries", "state-timeline", "heatmap", "table"}
	units      = []string{"percentunit", "s", "short", "ops", "suffix:x", "none", "bytes"}
)

func TestEveryPanelSaysWhatItShows(t *testing.T) {
	for _, b := range boards(t) {
		titles := map[string]bool{}
		for i, p := range b.Panels {
			if p.ID != i+1 {
				t.Errorf("%s: panel %d has the id %d", b.file, i+1, p.ID)
			}
			if p.Title == "" || titles[p.Title] {
				t.Errorf("%s: the title %q is empty or there twice", b.file, p.Title)
			}
			titles[p.Title] = true
			if !slices.Contains(panelTypes, p.Type) {
				t.Errorf("%s: %q is of the type %q, which nobody has looked at yet", b.file, p.Title, p.Type)
			}
			if p.Type == "row" {
				continue
			}
			d := p.FieldConfig.Defaults
			if len(p.Description) < 40 || d.NoValue == "" {
				t.Errorf("%s: %q lacks a description or a text for no data", b.file, p.Title)
			}
			if !slices.Contains(units, d.Unit) {
				t.Errorf("%s: %q has the unit %q, which is not on the list", b.file, p.Title, d.Unit)
			}
			if len(p.Targets) == 0 {
				t.Errorf("%s: %q asks nothing", b.file, p.Title)
			}
			for _, q := range p.Targets {
				if q.LegendFormat == "" {
					t.Errorf("%s: %q, query %s: no legend", b.file, p.Title, q.RefID)
				}
			}
			// 0.2 ms cannot be seen beside 100 ms on a linear axis.
			if p.Type == "timeseries" && (d.Unit == "s" || d.Unit == "suffix:x" && p.Title != "Imbalance") && d.Custom.ScaleDistribution.Type != "log" {
				t.Errorf("%s: %q needs a logarithmic axis", b.file, p.Title)
			}
		}
	}
}

func TestPanelsDoNotOverlap(t *testing.T) {
	for _, b := range boards(t) {
		var taken [24][200]string
		for _, p := range b.Panels {
			g := p.GridPos
			if g.W < 1 || g.H < 1 || g.X < 0 || g.X+g.W > 24 || g.Y < 0 || g.Y+g.H > 200 {
				t.Errorf("%s: %q is outside of the grid: %+v", b.file, p.Title, g)
				continue
			}
			for x := g.X; x < g.X+g.W; x++ {
				for y := g.Y; y < g.Y+g.H; y++ {
					if taken[x][y] != "" {
						t.Fatalf("%s: %q lies on %q", b.file, p.Title, taken[x][y])
					}
					taken[x][y] = p.Title
				}
			}
		}
	}
}

// asked are all queries of a dashboard, by where they are.
func (b board) asked() map[string]string {
	all := map[string]string{}
	for _, p := range b.Panels {
		for _, q := range p.Targets {
			all[p.Title+" "+q.RefID] = q.Expr
		}
	}
	for _, a := range b.Annotations.List {
		all["annotation "+a.Name] = a.Expr
	}
	for _, v := range b.Templating.List {
		if m := labelValues.FindStringSubmatch(v.Definition); m != nil {
			// So that the label is checked as well.
			all["variable "+v.Name] = "count by (" + m[2] + ") (" + m[1] + ")"
		}
	}
	return all
}

var labelValues = regexp.MustCompile(`^label_values\((.*), (\w+)\)$`)

func TestEveryQueryAsksForWhatALimiterExports(t *testing.T) {
	c := exported(t)
	for _, b := range boards(t) {
		asked := b.asked()
		if len(asked) < 10 {
			t.Errorf("%s: only %d queries were found", b.file, len(asked))
		}
		for where, expr := range asked {
			e := parse(t, interpolate(expr, everything))
			if e == nil {
				continue
			}
			for _, bad := range c.check(e) {
				t.Errorf("%s: %s: %s\n\t%s", b.file, where, bad, expr)
			}
		}
		for _, p := range b.Panels {
			for _, q := range p.Targets {
				e := parse(t, interpolate(q.Expr, everything))
				for _, m := range legendLabel.FindAllStringSubmatch(q.LegendFormat, -1) {
					if e != nil && !slices.Contains(c.labels(e), m[1]) {
						t.Errorf("%s: %q: the legend has {{%s}}, the result does not", b.file, p.Title, m[1])
					}
				}
			}
		}
	}
}

var legendLabel = regexp.MustCompile(`\{\{\s*(\w+)\s*\}\}`)

// Windows that mean something of themselves; everything else follows the zoom.
var fixedWindows = []string{"2m", "5m", "30m", "1h", "2h", "6h", "1d", "3d", "30d"}

func TestEveryQueryOfAPanelFollowsTheVariablesAndTheZoom(t *testing.T) {
	c := exported(t)
	window := regexp.MustCompile(`\[([^\]]+)\]`)
	for _, b := range boards(t) {
		for where, expr := range b.asked() {
			if strings.HasPrefix(where, "variable") {
				continue
			}
			for _, m := range window.FindAllStringSubmatch(expr, -1) {
				if m[1] != "$__rate_interval" && !slices.Contains(fixedWindows, m[1]) {
					t.Errorf("%s: %s: the window %s neither follows the zoom nor is one of %v", b.file, where, m[1], fixedWindows)
				}
			}
			// The variables' own names as values, so that a matcher that ignores them shows.
			e := parse(t, interpolate(expr, map[string]string{"__rate_interval": "2m"}))
			if e == nil {
				continue
			}
			for _, sel := range parser.ExtractSelectors(e) {
				var name string
				got := map[string]string{}
				for _, m := range sel {
					got[m.Name] = m.Value
					if m.Name == nameLabel {
						name = m.Value
					}
				}
				var want []string
				switch {
				case name == "ALERTS":
					want = []string{"job"}
				case !strings.HasPrefix(name, "redis_"): // redis_exporter has a job and an instance of its own
					want = []string{"job", "instance"}
				}
				for _, l := range []string{"shard_id", "limit"} {
					if _, has := c[name].values[l]; has && name != "ALERTS" && (l == "shard_id" || b.UID == "ringfence-limits") {
						want = append(want, l)
					}
				}
				for _, l := range want {
					if got[l] != "$"+l {
						t.Errorf("%s: %s: %s is not narrowed by $%s", b.file, where, name, l)
					}
				}
			}
		}
	}
}
