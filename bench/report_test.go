package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// stored are results made up for these tests: every kind of row, nothing measured.
func stored(t *testing.T) ([]result, about) {
	t.Helper()
	var rows []result
	var a about
	if err := readJSON("testdata/results.json", &rows); err != nil {
		t.Fatal(err)
	}
	if err := readJSON("testdata/run.json", &a); err != nil {
		t.Fatal(err)
	}
	return rows, a
}

func TestTheDocumentSaysWhatWasReached(t *testing.T) {
	rows, a := stored(t)
	text, charts := document(rows, a)
	for _, want := range []string{
		// 200k against 50k and, as the best rival that is right, 100k.
		"| `distinct` | 64 | ringfence | throughput | ≥ 2.50× | 4.00× | reached | ≥ 1.30× | 2.00× | reached (ulule) |",
		"| `distinct` | 64 | ringfence | Redis CPU | ≤ 0.45× | 0.50× | **not reached** | ≤ 0.80× | 0.62× | reached (ulule) |",
		// Slower by the medians, the ranges overlap.
		"| `distinct` | 1 | ringfence | throughput | ≥ 1.00× | 0.95× | within the spread | ≥ 1.00× | 0.95× | within the spread (redis_rate) |",
		// Fast, and wrong.
		"| `denied` | 64 | ringfence | throughput | ≥ 100× | 200× | **not reached** (grants wrongly) | ≥ 50× | 200× | **not reached** (grants wrongly) (redis_rate) |",
		// Fast, and often not the limit's answer.
		"| `hot` | 64 | ringfence | throughput | ≥ 8.00× | 20× | **not reached** (10.0 % of the calls not decided) |",
		"| `zipf` | 64 | ringfence | throughput | ≥ 4.50× | – | not measured | ≥ 2.50× | – | not measured |",
		"| `cluster` | 64 | ringfence | throughput | ≥ 1.80× | – | not measured | – | – |  |",
		"ringfence at 512 callers makes 90 % of that (wanted: at least 85 %, reached)",
		"| throttled | 150k | 150k–150k | 3.00× | 300 / 900 / 1000 | 9.00 | 9.00 | 30.0, 900 | 11 / 10 | **grants wrongly**; 7 errors, not counted: gave up / after 10 |",
		"| 64 | 4 | 150k | 140k–160k | 0.75× |",
		"- hot, throttled, 512 callers: no answer",
		"| machine | A machine, GOMAXPROCS 2 |",
		"(not in this run)",
		"![Decisions a second, 64 callers (more is better)](benchmarks-throughput-64.svg)",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the document does not say %s", want)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
	if len(charts) != 2 {
		t.Errorf("%d charts, want those of 64 callers", len(charts))
	}
	for name := range charts {
		if !strings.Contains(text, "]("+name+")") {
			t.Errorf("the document does not show %s", name)
		}
	}
	again, _ := document(rows, a)
	if again != text {
		t.Error("the same results give another document")
	}
}

func TestAnEmptyRunIsSaidToBeOne(t *testing.T) {
	text, charts := document(nil, about{})
	if !strings.Contains(text, "The physical limit was not measured.") || strings.Contains(text, "| reached") && strings.Contains(text, "×) |") || len(charts) != 0 {
		t.Error(text)
	}
	if strings.Count(text, "not measured") < len(targets) {
		t.Error("a target without results is passed over")
	}
}

// TestTheDocumentIsThatOfTheStoredResults: nobody has changed the one without the other.
func TestTheDocumentIsThatOfTheStoredResults(t *testing.T) {
	rows, a, err := readResults("..")
	if err != nil {
		t.Fatal(err)
	}
	text, charts := document(rows, a)
	charts["benchmarks.md"] = text
	for name, want := range charts {
		got, err := os.ReadFile(filepath.Join("..", "docs", name))
		if err != nil {
			t.Error(err)
		} else if string(got) != want {
			t.Errorf("docs/%s is not what bench/results.json gives; run make bench ARGS=-report", name)
		}
	}
}

func TestChartsAreWellFormed(t *testing.T) {
	for _, groups := range [][]chartGroup{
		{{"one", []chartBar{{own, 0.3}, {"a & <b>", 12345678}}}, {"two", []chartBar{{leased, 1000}}}},
		{{"alone", []chartBar{{"redis_rate", 1}}}},
	} {
		svg := chart("a < b", " µs", groups)
		d := xml.NewDecoder(strings.NewReader(svg))
		bars := -1 // the background is a rect too
		for {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%v\n%s", err, svg)
			}
			start, ok := token.(xml.StartElement)
			if !ok || start.Name.Local != "rect" {
				continue
			}
			bars++
			for _, a := range start.Attr {
				if a.Name.Local == "width" && (strings.HasPrefix(a.Value, "-") || a.Value == "0.0" || a.Value == "NaN") {
					t.Errorf("a bar is %s wide", a.Value)
				}
			}
		}
		want := 0
		for _, g := range groups {
			want += len(g.bars)
		}
		if bars != want {
			t.Errorf("%d bars, want %d", bars, want)
		}
	}
}

func TestNumbersAreShort(t *testing.T) {
	for v, want := range map[float64]string{12: "12", 1234: "1.2k", 54_321: "54.3k", 99_960: "100k", 123_456: "123k", 999_900: "1.00M", 1_578_600: "1.58M", 13_453_600: "13.5M"} {
		if got := count(v); got != want {
			t.Errorf("%g is written %s, want %s", v, got, want)
		}
	}
}
