package observability_test

import (
	"os"
	"reflect"
	"testing"

	"go.yaml.in/yaml/v3"
)

func readFile(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestThePrometheusRuleHoldsTheSameRules(t *testing.T) {
	var object struct {
		APIVersion string `yaml:"apiVersion"`
		Kind       string
		Metadata   struct{ Name string }
		Spec       map[string]any
	}
	if err := yaml.Unmarshal([]byte(readFile(t, alerts+"/ringfence.prometheusrule.yaml")), &object); err != nil {
		t.Fatal(err)
	}
	if object.APIVersion != "monitoring.coreos.com/v1" || object.Kind != "PrometheusRule" || object.Metadata.Name == "" {
		t.Errorf("it is a %s %s named %q", object.APIVersion, object.Kind, object.Metadata.Name)
	}
	var rules map[string]any
	if err := yaml.Unmarshal([]byte(mainRules(t)), &rules); err != nil {
		t.Fatal(err)
	}
	if len(rules) == 0 || !reflect.DeepEqual(object.Spec, rules) {
		t.Error("its spec is not ringfence.rules.yml: run go generate in observability/")
	}
}
