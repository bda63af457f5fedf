package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// chartGroup is a group of bars, one below the other.
type chartGroup struct {
	name string
	bars []chartBar
}

type chartBar struct {
	name  string
	value float64 // above 0
}

// The measures of a chart, in px.
const (
	chartWidth  = 760
	chartLeft   = 170 // where bars begin
	chartRight  = 90  // kept for the numbers behind the bars
	chartBarRow = 17
	chartGap    = 30 // above each group, for its name
	chartTop    = 44
)

// chart draws bars on a logarithmic scale, which begins at a power of ten below the least
// value, as an SVG that needs nothing else and reads on light and on dark.
func chart(title, unit string, groups []chartGroup) string {
	least, most, rows := math.Inf(1), 0.0, 0
	for _, g := range groups {
		for _, b := range g.bars {
			least, most, rows = min(least, b.value), max(most, b.value), rows+1
		}
	}
	low := math.Floor(math.Log10(least))
	if math.Log10(least)-low < 0.05 {
		low-- // the shortest bar must be seen
	}
	high := math.Ceil(math.Log10(most))
	scale := (chartWidth - chartLeft - chartRight) / max(1, high-low)
	height := chartTop + rows*chartBarRow + len(groups)*chartGap + 26

	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" font-family="sans-serif" font-size="12">`, chartWidth, height, chartWidth, height)
	line(`<title>%s</title>`, html.EscapeString(title))
	line(`<rect width="%d" height="%d" fill="#ffffff"/>`, chartWidth, height)
	line(`<text x="12" y="22" font-size="15" font-weight="bold" fill="#1b1f24">%s</text>`, html.EscapeString(title))
	for e := low; e <= high; e++ {
		x := chartLeft + (e-low)*scale
		line(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#d8dee4"/>`, x, chartTop-8, x, height-22)
		line(`<text x="%.1f" y="%d" text-anchor="middle" fill="#57606a">%s</text>`, x, height-8, axisText(e))
	}
	y := chartTop
	for _, g := range groups {
		line(`<text x="12" y="%d" font-weight="bold" fill="#1b1f24">%s</text>`, y+chartGap-10, html.EscapeString(g.name))
		y += chartGap - 4
		for _, bar := range g.bars {
			width := (math.Log10(bar.value) - low) * scale
			line(`<text x="%d" y="%d" text-anchor="end" fill="#1b1f24">%s</text>`, chartLeft-6, y+12, html.EscapeString(bar.name))
			line(`<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`, chartLeft, y+1, width, chartBarRow-4, colorOf(bar.name))
			line(`<text x="%.1f" y="%d" fill="#57606a">%s%s</text>`, chartLeft+width+5, y+12, valueText(bar.value), html.EscapeString(unit))
			y += chartBarRow
		}
		y += 4
	}
	line(`</svg>`)
	return b.String()
}

// colorOf keeps a system's colour the same in all charts; ours stand out. They differ in
// lightness too, for those who do not tell them apart by hue.
func colorOf(name string) string {
	switch name {
	case own:
		return "#0550ae"
	case leased:
		return "#54aeff"
	}
	greys := []string{"#6e7781", "#8c959f", "#afb8c1", "#7d8590", "#9ea7b0", "#bcc4cc"}
	return greys[max(0, slices.Index(rivals, name))%len(greys)]
}

func axisText(exponent float64) string {
	if exponent < 0 {
		return fmt.Sprintf("%g", math.Pow(10, exponent))
	}
	return strings.NewReplacer("1.00M", "1M", "10.0M", "10M", "1.0k", "1k", "10.0k", "10k").Replace(count(math.Pow(10, exponent)))
}

func valueText(v float64) string {
	if v < 10 {
		return timeText(v)
	}
	return count(v)
}
