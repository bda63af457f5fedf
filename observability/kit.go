package observability

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/variants"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/heatmap"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/statetimeline"
	"github.com/grafana/grafana-foundation-sdk/go/table"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
)

// The types are those of the classic JSON, which Grafana 10 to 13 import. Those that the
// SDK prefers are for newer ones only.
type (
	classic        = dashboard.Dashboard        //nolint:staticcheck // see above
	classicBuilder = dashboard.DashboardBuilder //nolint:staticcheck // see above
)

// Dashboard is one dashboard and the name of its file.
type Dashboard struct {
	// File is the name of the file in ../dashboards, "ringfence-overview.json".
	File string
	// Build makes the dashboard.
	Build func() (classic, error)
}

// All are the dashboards of this repository.
func All() []Dashboard {
	return []Dashboard{
		{File: "ringfence-overview.json", Build: Overview},
		{File: "ringfence-slo.json", Build: SLO},
		{File: "ringfence-shards.json", Build: Shards},
		{File: "ringfence-limits.json", Build: Limits},
		{File: "ringfence-client.json", Build: Client},
	}
}

// JSON is the dashboard as Grafana imports it.
func (d Dashboard) JSON() ([]byte, error) {
	built, err := d.Build()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.File, err)
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // "<" and ">" are common in queries, and people read the file
	e.SetIndent("", "  ")
	if err := e.Encode(built); err != nil {
		return nil, fmt.Errorf("%s: %w", d.File, err)
	}
	return b.Bytes(), nil
}

func ptr[T any](v T) *T { return &v }

// source is whatever the reader chose in the variable "datasource": a dashboard that
// names a data source of its own works in one Grafana only.
var source = common.DataSourceRef{Type: ptr("prometheus"), Uid: ptr("${datasource}")}

// Matchers of the variables. What has a shard_id is filtered by it too.
const (
	process  = `job=~"$job",instance=~"$instance"`
	ofShards = process + `,shard_id=~"$shard_id"`
	ofLimits = process + `,limit=~"$limit"`
)

// playbook is where the alerts' sections are.
const playbook = "https://github.com/ringfence/ringfence/blob/main/alerts/playbook.md"

// layout hands out ids and places: panels flow from left to right, rows end a line.
type layout struct {
	id, x, y, height uint32
	dash             *classicBuilder
	folded           *dashboard.RowBuilder // the row that takes the panels, if it is folded
}

// choice is a variable of the reader's: several values, or all of them.
func choice(name, label, metric, about string) *dashboard.QueryVariableBuilder {
	query := fmt.Sprintf("label_values(%s, %s)", metric, name)
	return dashboard.NewQueryVariableBuilder(name).Label(label).Description(about).
		Datasource(source).
		Query(dashboard.StringOrMap{Map: map[string]any{"qryType": 1, "query": query, "refId": "variable-" + name}}).
		Definition(query).
		Refresh(dashboard.VariableRefreshOnTimeRangeChanged).Sort(dashboard.VariableSortNaturalAsc).
		Multi(true).IncludeAll(true).AllValue(".+").
		Current(dashboard.VariableOption{
			Selected: ptr(true),
			Text:     dashboard.StringOrArrayOfString{ArrayOfString: []string{"All"}},
			Value:    dashboard.StringOrArrayOfString{ArrayOfString: []string{"$__all"}},
		})
}

// event is an annotation: a line where the query has a value.
func event(name, color, expr, text, tags string) *dashboard.AnnotationQueryBuilder {
	return dashboard.NewAnnotationQueryBuilder().
		Name(name).Datasource(source).Enable(true).Hide(false).IconColor(color).
		Expr(expr).Step("60s").TitleFormat(name).TextFormat(text).TagKeys(tags)
}

// newLayout begins a dashboard with what all of ours have in common.
func newLayout(title, uid, description, tag string) *layout {
	b := dashboard.NewDashboardBuilder(title) //nolint:staticcheck // as for classic
	return &layout{dash: b.Uid(uid).Description(description).Tags([]string{"ringfence", tag}).
		Readonly().Timezone("utc").Tooltip(dashboard.DashboardCursorSyncCrosshair).
		Time("now-6h", "now").Refresh("1m").
		Link(dashboard.NewDashboardLinkBuilder("Ringfence").Type(dashboard.DashboardLinkTypeDashboards).
			Tags([]string{"ringfence"}).AsDropdown(true).IncludeVars(true).KeepTime(true).
			Icon("dashboard").Tooltip("The other dashboards, with the same choices and times")).
		Link(dashboard.NewDashboardLinkBuilder("Playbook").Type(dashboard.DashboardLinkTypeLink).
			Icon("doc").Tooltip("What each alert means and what to do").TargetBlank(true).Url(playbook)).
		WithVariable(dashboard.NewDatasourceVariableBuilder("datasource").Label("Data source").
			Description("The Prometheus that scrapes the processes.").Type("prometheus").
			Current(dashboard.VariableOption{
				Selected: ptr(true),
				Text:     dashboard.StringOrArrayOfString{String: ptr("default")},
				Value:    dashboard.StringOrArrayOfString{String: ptr("default")},
			})).
		WithVariable(choice("job", "Job", "ratelimiter_build_info", "The service that limits.")).
		WithVariable(choice("instance", "Instance", `ratelimiter_build_info{job=~"$job"}`, "One process of the service.")).
		WithVariable(choice("shard_id", "Shard", `ratelimiter_circuit_state{job=~"$job",instance=~"$instance"}`, "The id of a shard in Config.Shards.")).
		Annotation(event("Breaker opened", "red",
			`sum by (shard_id) (increase(ratelimiter_circuit_transitions_total{`+ofShards+`,from="closed",to="open"}[2m])) > 0`,
			"shard {{shard_id}}", "shard_id")).
		Annotation(event("Version changed", "blue",
			`count by (version) (ratelimiter_build_info{`+process+`}) unless count by (version) (ratelimiter_build_info{`+process+`} offset 5m)`,
			"now also {{version}}", "version")).
		Annotation(event("Page", "purple",
			`count by (alertname, job) (ALERTS{alertname=~"Ringfence.+",alertstate="firing",severity="page",job=~"$job"})`,
			"{{alertname}} of {{job}}: see the playbook", "alertname,job"))}
}

// add puts a panel where the layout is.
func (l *layout) add(p cog.Builder[dashboard.Panel]) {
	if l.folded != nil {
		l.folded.WithPanel(p)
		return
	}
	l.dash.WithPanel(p)
}

// build ends the dashboard.
func (l *layout) build() (classic, error) {
	if l.folded != nil {
		l.dash.WithRow(l.folded)
	}
	return l.dash.Build()
}

// fold begins a row that is closed until somebody opens it. It is the last of its
// dashboard.
func (l *layout) fold(title string) {
	l.id++
	l.y, l.x, l.height = l.y+l.height, 0, 0
	l.folded = dashboard.NewRowBuilder(title).Id(l.id).Collapsed(true).
		GridPos(dashboard.GridPos{X: 0, Y: l.y, W: 24, H: 1})
	l.y++
}

func (l *layout) row(title string) {
	l.id++
	l.y, l.x, l.height = l.y+l.height, 0, 0
	l.dash.WithRow(dashboard.NewRowBuilder(title).Id(l.id).
		GridPos(dashboard.GridPos{X: 0, Y: l.y, W: 24, H: 1}))
	l.y++
}

// place is the next panel's id and place.
func (l *layout) place(w, h uint32) (uint32, dashboard.GridPos) {
	if l.x+w > 24 {
		l.x, l.y, l.height = 0, l.y+l.height, 0
	}
	at := dashboard.GridPos{X: l.x, Y: l.y, W: w, H: h}
	l.x, l.height, l.id = l.x+w, max(l.height, h), l.id+1
	return l.id, at
}

// query is one line, or one set of lines, of a panel.
type query struct {
	expr, legend string
}

func (q query) target(i int) cog.Builder[variants.Dataquery] {
	return prometheus.NewDataqueryBuilder().Datasource(source).Expr(q.expr).LegendFormat(q.legend).
		Range().EditorMode(prometheus.QueryEditorModeCode).RefId(string(rune('A' + i)))
}

// panel is what every panel must have; nobody can leave one of them out.
type panel struct {
	title, about string
	unit         string
	noData       string // what it says when there is nothing to show
	w, h         uint32
	queries      []query
}

// step is a threshold: the colour from this value on.
type step struct {
	from  float64
	color string
}

// steps are thresholds that begin with base, whatever is below the first.
func steps(base string, more ...step) *dashboard.ThresholdsConfigBuilder {
	all := []dashboard.Threshold{{Color: base}}
	for _, s := range more {
		all = append(all, dashboard.Threshold{Value: ptr(s.from), Color: s.color})
	}
	return dashboard.NewThresholdsConfigBuilder().Mode(dashboard.ThresholdsModeAbsolute).Steps(all)
}

// number is a panel with one figure and its recent course.
func (l *layout) number(p panel, decimals float64, th *dashboard.ThresholdsConfigBuilder) {
	id, at := l.place(p.w, p.h)
	b := stat.NewPanelBuilder().Id(id).GridPos(at).Datasource(source).
		Title(p.title).Description(p.about).Unit(p.unit).NoValue(p.noData).Decimals(decimals).
		Thresholds(th).ColorScheme(dashboard.NewFieldColorBuilder().Mode(dashboard.FieldColorModeIdThresholds)).
		ColorMode(common.BigValueColorModeValue).GraphMode(common.BigValueGraphModeArea).
		ReduceOptions(common.NewReduceDataOptionsBuilder().Calcs([]string{"lastNotNull"}))
	if len(p.queries) > 1 || strings.Contains(p.queries[0].legend, "{{") {
		b.TextMode(common.BigValueTextModeValueAndName)
	} else {
		b.TextMode(common.BigValueTextModeValue)
	}
	for i, q := range p.queries {
		b.WithTarget(q.target(i))
	}
	l.add(b)
}

// lines begins a panel with lines over time. add puts it on the dashboard.
func (l *layout) lines(p panel) *timeseries.PanelBuilder {
	id, at := l.place(p.w, p.h)
	b := timeseries.NewPanelBuilder().Id(id).GridPos(at).Datasource(source).
		Title(p.title).Description(p.about).Unit(p.unit).NoValue(p.noData).
		ColorScheme(dashboard.NewFieldColorBuilder().Mode(dashboard.FieldColorModeIdPaletteClassic)).
		LineWidth(1).FillOpacity(0).ShowPoints(common.VisibilityModeNever).
		Legend(common.NewVizLegendOptionsBuilder().ShowLegend(true).
			DisplayMode(common.LegendDisplayModeList).Placement(common.LegendPlacementBottom).Calcs([]string{})).
		Tooltip(common.NewVizTooltipOptionsBuilder().Mode(common.TooltipDisplayModeMulti).Sort(common.SortOrderDescending))
	for i, q := range p.queries {
		b.WithTarget(q.target(i))
	}
	return b
}

// logarithmic is an axis on which 0.2 ms and 100 ms can be seen side by side.
func logarithmic() *common.ScaleDistributionConfigBuilder {
	return common.NewScaleDistributionConfigBuilder().Type(common.ScaleDistributionLog).Log(10)
}

// toShard leads from whatever has a shard_id to that shard's page.
func toShard() []cog.Builder[dashboard.DashboardLink] {
	return []cog.Builder[dashboard.DashboardLink]{
		dashboard.NewDashboardLinkBuilder("Shard ${__field.labels.shard_id}").
			Url("/d/ringfence-shards?var-shard_id=${__field.labels.shard_id}&${job:queryparam}&${datasource:queryparam}&${__url_time_range}"),
	}
}

func stacked() *common.StackingConfigBuilder {
	return common.NewStackingConfigBuilder().Mode(common.StackingModeNormal).Group("A")
}

// painted gives a line its colour by name, so that a colour means the same everywhere.
func painted(b *timeseries.PanelBuilder, name, color string) {
	b.OverrideByName(name, []dashboard.DynamicConfigValue{
		{Id: "color", Value: map[string]string{"mode": "fixed", "fixedColor": color}},
	})
}

// span maps values from a to b, both included, to a word and a colour.
func span(a, b float64, text, color string, index int32) dashboard.ValueMapping {
	return dashboard.ValueMapping{RangeMap: &dashboard.RangeMap{
		Type: dashboard.MappingTypeRangeToText,
		Options: dashboard.DashboardRangeMapOptions{
			From: ptr(a), To: ptr(b),
			Result: dashboard.ValueMappingResult{Text: ptr(text), Color: ptr(color), Index: ptr(index)},
		},
	}}
}

// timeline is a panel with one bar for each series, coloured by what its values mean.
func (l *layout) timeline(p panel, meanings ...dashboard.ValueMapping) {
	id, at := l.place(p.w, p.h)
	b := statetimeline.NewPanelBuilder().Id(id).GridPos(at).Datasource(source).
		Title(p.title).Description(p.about).Unit(p.unit).NoValue(p.noData).
		ColorScheme(dashboard.NewFieldColorBuilder().Mode(dashboard.FieldColorModeIdThresholds)).
		Thresholds(steps("green", step{0.0001, "yellow"}, step{0.5, "red"})).
		DataLinks(toShard()).Mappings(meanings).MergeValues(true).ShowValue(common.VisibilityModeAuto).
		RowHeight(0.85).FillOpacity(80).LineWidth(0).
		Legend(common.NewVizLegendOptionsBuilder().ShowLegend(true).
			DisplayMode(common.LegendDisplayModeList).Placement(common.LegendPlacementBottom).Calcs([]string{})).
		Tooltip(common.NewVizTooltipOptionsBuilder().Mode(common.TooltipDisplayModeSingle).Sort(common.SortOrderNone))
	for i, q := range p.queries {
		b.WithTarget(q.target(i))
	}
	l.add(b)
}

// heat is a panel that shows where the values of a histogram lie.
func (l *layout) heat(p panel) {
	id, at := l.place(p.w, p.h)
	b := heatmap.NewPanelBuilder().Id(id).GridPos(at).Datasource(source).
		Title(p.title).Description(p.about).Unit(p.unit).NoValue(p.noData).
		Calculate(false).CellGap(1).
		Color(heatmap.NewHeatmapColorOptionsBuilder().Mode(heatmap.HeatmapColorModeScheme).
			Scheme("Oranges").Scale(heatmap.HeatmapColorScaleExponential).Exponent(0.5).Steps(64).Reverse(false)).
		CellValues(heatmap.NewCellValuesBuilder().Unit("short")).
		YAxis(heatmap.NewYAxisConfigBuilder().Unit(p.unit).AxisPlacement(common.AxisPlacementLeft)).
		Tooltip(heatmap.NewHeatmapTooltipBuilder().Mode(common.TooltipDisplayModeSingle).YHistogram(true))
	for i, q := range p.queries {
		b.WithTarget(prometheus.NewDataqueryBuilder().Datasource(source).Expr(q.expr).LegendFormat(q.legend).
			Range().EditorMode(prometheus.QueryEditorModeCode).Format(prometheus.PromQueryFormatHeatmap).
			RefId(string(rune('A' + i))))
	}
	l.add(b)
}

// column is a column of a table: what Prometheus calls it and what we call it. A column
// that is not named is not shown.
type column struct{ field, title, unit string }

// rows is a panel with a row for each series as it is now; the queries' values become
// columns beside the labels that they share.
func (l *layout) rows(p panel, columns ...column) {
	id, at := l.place(p.w, p.h)
	names, order := map[string]string{}, map[string]int{}
	only := make([]string, len(columns))
	for i, c := range columns {
		names[c.field], order[c.field], only[i] = c.title, i, c.field
	}
	b := table.NewPanelBuilder().Id(id).GridPos(at).Datasource(source).
		Title(p.title).Description(p.about).Unit(p.unit).NoValue(p.noData).ShowHeader(true).
		WithTransformation(dashboard.DataTransformerConfig{Id: "merge", Options: map[string]any{}}).
		WithTransformation(dashboard.DataTransformerConfig{Id: "filterFieldsByName", Options: map[string]any{
			"include": map[string]any{"names": only}}}).
		WithTransformation(dashboard.DataTransformerConfig{Id: "organize", Options: map[string]any{
			"renameByName": names, "indexByName": order, "excludeByName": map[string]any{}}})
	for _, c := range columns {
		if c.unit != "" {
			b.OverrideByName(c.title, []dashboard.DynamicConfigValue{{Id: "unit", Value: c.unit}})
		}
	}
	for i, q := range p.queries {
		b.WithTarget(prometheus.NewDataqueryBuilder().Datasource(source).Expr(q.expr).LegendFormat(q.legend).
			Instant().EditorMode(prometheus.QueryEditorModeCode).Format(prometheus.PromQueryFormatTable).
			RefId(string(rune('A' + i))))
	}
	l.add(b)
}

// means maps one value to a word and a colour.
func means(value, text, color string, index int32) dashboard.ValueMapping {
	return dashboard.ValueMapping{ValueMap: &dashboard.ValueMap{
		Type: dashboard.MappingTypeValueToText,
		Options: map[string]dashboard.ValueMappingResult{
			value: {Text: ptr(text), Color: ptr(color), Index: ptr(index)},
		},
	}}
}

// plot puts a panel with lines on the dashboard as it is.
func (l *layout) plot(p panel) { l.add(l.lines(p).Min(0)) }

// perSecond is the rate of a counter, summed by labels.
func perSecond(by, selector string) string {
	return "sum by (" + by + ") (rate(" + selector + "[$__rate_interval]))"
}
