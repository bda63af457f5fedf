package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"
)

// result is what one cell of the matrix came to. All its fields are in results.json, and
// all are required there.
type result struct {
	Fault     string `json:"fault"`
	Policy    string `json:"policy"`
	Algorithm string `json:"algorithm"`
	// Admitted is how many units were admitted in the cell, by whomever, and Bound how many
	// may be.
	Admitted int `json:"admitted"`
	Bound    int `json:"bound"`
	// P50, P999 and Max are call times during the fault, in microseconds.
	P50  int64 `json:"p50_us"`
	P999 int64 `json:"p999_us"`
	Max  int64 `json:"max_us"`
	// Recovery is the time until every process of the cell was answered by the primary for
	// every key: since the fault ended, or since it began where the servers mend it.
	Recovery int64 `json:"recovery_ms"`
	// ShardCalls is how many operations and probes one process sent to the shard while it was
	// away, the busiest process of the cell.
	ShardCalls int `json:"shard_calls"`
	// OK says that no promise was broken.
	OK bool `json:"ok"`
}

func (r result) id() string { return r.Fault + "/" + r.Policy + "/" + r.Algorithm }

// fields are the names of all fields, in order.
var fields = []string{
	"fault", "policy", "algorithm", "admitted", "bound", "p50_us", "p999_us", "max_us",
	"recovery_ms", "shard_calls", "ok",
}

// readResults reads results.json strictly: every field, no other, no cell twice.
func readResults(file string) ([]result, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	out, err := parseResults(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return out, nil
}

func parseResults(text []byte) ([]result, error) {
	var raw []map[string]json.RawMessage
	if err := json.Unmarshal(text, &raw); err != nil {
		return nil, err
	}
	for i, cell := range raw {
		for _, f := range fields {
			if v, ok := cell[f]; !ok || string(v) == "null" {
				return nil, fmt.Errorf("cell %d has no %q", i, f)
			}
		}
	}
	var out []result
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&out); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for _, r := range out {
		if seen[r.id()] {
			return nil, fmt.Errorf("cell %s is there twice", r.id())
		}
		seen[r.id()] = true
	}
	return out, nil
}

func formatResults(all []result) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString("[")
	for i, r := range all { // one cell a line, so that a diff shows cells
		line, err := json.Marshal(r)
		if err != nil {
			return nil, err
		}
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString("\n  ")
		b.Write(line)
	}
	b.WriteString("\n]\n")
	return b.Bytes(), nil
}

// broken are the cells that are not ok, and those of the matrix that are not there at all:
// either makes the command exit with 1.
func broken(all []result, expected []cellID) []string {
	var out []string
	there := map[string]bool{}
	for _, r := range all {
		there[r.id()] = true
		if !r.OK {
			out = append(out, r.id())
		}
	}
	for _, c := range expected {
		if id := c.String(); !there[id] {
			out = append(out, id+" (not run)")
		}
	}
	slices.Sort(out)
	return out
}
