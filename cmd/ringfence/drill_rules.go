package main

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// A duration of Prometheus, such as 1h30m.
const promDuration = `(?:[0-9]+(?:ms|[smhdwy]))+`

var (
	// Where a rule file holds durations: in the fields of a group and of a rule,
	ruleField = regexp.MustCompile(`^(\s*(?:- )?(?:for|keep_firing_for|interval|query_offset):\s*"?)(` + promDuration + `)`)
	// and in expressions, as a range or subquery, and as an offset.
	ruleRange    = regexp.MustCompile(`\[\s*` + promDuration + `\s*(?::\s*(?:` + promDuration + `)?\s*)?\]`)
	ruleOffset   = regexp.MustCompile(`\boffset\s+-?\s*` + promDuration)
	oneDuration  = regexp.MustCompile(promDuration)
	durationPart = regexp.MustCompile(`([0-9]+)(ms|[smhdwy])`)
	// What a human reads stays as it is.
	ruleText = regexp.MustCompile(`^\s*(?:#|(?:summary|description|[a-z_]+_url):)`)
)

var promUnits = map[string]time.Duration{
	"ms": time.Millisecond, "s": time.Second, "m": time.Minute, "h": time.Hour,
	"d": 24 * time.Hour, "w": 7 * 24 * time.Hour, "y": 365 * 24 * time.Hour,
}

// scaleRules divides every duration of a file of Prometheus rules: windows, offsets, for
// and interval. Names, labels and thresholds stay, so an alert over "1h" is still called
// that when its window is a minute. It reads text, not YAML: one duration must not be
// broken over two lines, and annotations must be on one.
func scaleRules(text string, scale int) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		switch {
		case ruleText.MatchString(line):
		case ruleField.MatchString(line):
			lines[i] = ruleField.ReplaceAllStringFunc(line, func(s string) string {
				m := ruleField.FindStringSubmatch(s)
				return m[1] + scaleDuration(m[2], scale)
			})
		default:
			inside := func(s string) string {
				return oneDuration.ReplaceAllStringFunc(s, func(d string) string { return scaleDuration(d, scale) })
			}
			line = ruleRange.ReplaceAllStringFunc(line, inside)
			lines[i] = ruleOffset.ReplaceAllStringFunc(line, inside)
		}
	}
	return strings.Join(lines, "\n")
}

// scaleDuration divides one duration; the result is at least 1 ms, unless it was 0.
func scaleDuration(d string, scale int) string {
	total := time.Duration(0)
	for _, part := range durationPart.FindAllStringSubmatch(d, -1) {
		n, err := strconv.Atoi(part[1])
		if err != nil {
			return d // no rule has 2^63 of anything
		}
		total += time.Duration(n) * promUnits[part[2]]
	}
	if total == 0 {
		return d
	}
	return promText(total / time.Duration(scale))
}

// promText writes a duration as Prometheus reads it, to the millisecond, at least one.
func promText(d time.Duration) string {
	ms := max(1, d.Milliseconds())
	if ms%1000 == 0 {
		return fmt.Sprintf("%ds", ms/1000)
	}
	return fmt.Sprintf("%dms", ms)
}
