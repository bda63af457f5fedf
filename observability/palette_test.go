//go:build pictures

package observability_test

import (
	"cmp"
	"image"
	"image/color"
	"image/png"
	"os"
	"slices"
	"testing"
)

// shrink rewrites a picture with the 256 colours that it uses most, which makes it a third
// of the size.
func shrink(t testing.TB, path string) {
	t.Helper()
	in, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	from, err := png.Decode(in)
	if err != nil {
		t.Fatal(err)
	}
	bounds, count := from.Bounds(), map[color.RGBA]int{}
	at := func(x, y int) color.RGBA { return color.RGBAModel.Convert(from.At(x, y)).(color.RGBA) }
	for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
		for x := bounds.Min.X; x < bounds.Max.X; x++ {
			count[at(x, y)]++
		}
	}
	var colors []color.RGBA
	for c := range count {
		colors = append(colors, c)
	}
	slices.SortFunc(colors, func(a, b color.RGBA) int {
		return cmp.Or(cmp.Compare(count[b], count[a]), cmp.Compare(a.R, b.R), cmp.Compare(a.G, b.G), cmp.Compare(a.B, b.B))
	})
	// Shades of one colour, which are nearly all of them, count together: else they would
	// push out the colours of thin lines.
	type shade [3]uint8
	of := func(c color.RGBA) shade { return shade{c.R / 16, c.G / 16, c.B / 16} }
	together, first := map[shade]int{}, map[shade]color.RGBA{}
	var shades []shade
	for _, c := range colors {
		if _, seen := first[of(c)]; !seen {
			first[of(c)], shades = c, append(shades, of(c))
		}
		together[of(c)] += count[c]
	}
	slices.SortStableFunc(shades, func(a, b shade) int { return cmp.Compare(together[b], together[a]) })
	var palette color.Palette
	for _, s := range shades[:min(256, len(shades))] {
		palette = append(palette, first[s])
	}
	index := map[color.RGBA]uint8{}
	for c := range count {
		index[c] = uint8(palette.Index(c))
	}
	to := image.NewPaletted(bounds, palette)
	for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
		for x := bounds.Min.X; x < bounds.Max.X; x++ {
			to.SetColorIndex(x, y, index[at(x, y)])
		}
	}
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	e := png.Encoder{CompressionLevel: png.BestCompression}
	if err := e.Encode(out, to); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	const most = 250_000
	if info, err := os.Stat(path); err != nil || info.Size() > most {
		t.Errorf("%s has more than %d bytes: %v", path, most, err)
	}
}
