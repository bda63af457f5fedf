// Package observability holds the dashboards as typed Go, from which the JSON files in
// ../dashboards are generated, and the tests of those and of ../alerts. It is a module of
// its own so that users of the library get neither Grafana's types nor Prometheus.
//
// A further dashboard is one function that returns a dashboard and one line in All; the
// tests go over All, and over every file in ../alerts.
package observability

//go:generate go run ./cmd/dashboards ../dashboards
//go:generate go run ./cmd/prometheusrule ../alerts/ringfence.rules.yml ../alerts/ringfence.prometheusrule.yaml
