package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/ringfence/ringfence/alerts"
	"github.com/ringfence/ringfence/internal/redistest"
)

// errNoProgram says what to install.
var errNoProgram = errors.New("a program is missing")

// programs are the binaries of the monitoring, under the names they have on Debian and
// upstream.
var programs = []struct {
	names []string
	apt   string
}{
	{[]string{"prometheus"}, "prometheus"},
	{[]string{"prometheus-alertmanager", "alertmanager"}, "prometheus-alertmanager"},
}

// findPrograms returns the paths, in the order of programs.
func findPrograms() ([]string, error) {
	var paths, missing []string
	for _, p := range programs {
		found := ""
		for _, name := range p.names {
			if path, err := exec.LookPath(name); err == nil {
				found = path
				break
			}
		}
		if found == "" {
			missing = append(missing, p.apt)
		}
		paths = append(paths, found)
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("%w: not in PATH: %s (Debian: apt-get install %s; macOS: brew install prometheus alertmanager)",
			errNoProgram, strings.Join(missing, " and "), strings.Join(missing, " "))
	}
	return paths, nil
}

// monitoring is a real Prometheus and a real Alertmanager in a temporary directory, the
// endpoints that they scrape, and the receiver that they page.
type monitoring struct {
	dir      string
	client   *http.Client
	servers  []*http.Server
	programs []*redistest.Program
	// prometheus and alertmanager are base URLs.
	prometheus, alertmanager string
	pages                    *pager
	apps                     int
}

// shortWindow is the shortest window of the shipped rules; scraping follows it.
const shortWindow = 5 * time.Minute

// startMonitoring starts all of it, with the shipped rules scaled.
func startMonitoring(ctx context.Context, scale int, apps []prometheus.Gatherer) (m *monitoring, err error) {
	paths, err := findPrograms()
	if err != nil {
		return nil, err
	}
	m = &monitoring{client: &http.Client{Transport: &http.Transport{}, Timeout: 5 * time.Second}, pages: newPager(), apps: len(apps)}
	defer func() {
		if err != nil {
			m.close()
			m = nil
		}
	}()
	if m.dir, err = os.MkdirTemp("", "ringfence-drill-"); err != nil {
		return m, err
	}
	var targets []string
	for _, g := range apps {
		addr, err := m.serve(promhttp.HandlerFor(g, promhttp.HandlerOpts{}))
		if err != nil {
			return m, err
		}
		targets = append(targets, addr)
	}
	webhook, err := m.serve(m.pages)
	if err != nil {
		return m, err
	}
	if m.alertmanager, err = m.run(ctx, "alertmanager", paths[1], alertmanagerConfig(webhook),
		"--storage.path="+filepath.Join(m.dir, "alertmanager"), "--cluster.listen-address=", "--log.level=warn"); err != nil {
		return m, err
	}
	for name, text := range alerts.Rules() {
		if err := os.WriteFile(filepath.Join(m.dir, name), []byte(scaleRules(text, scale)), 0o600); err != nil {
			return m, err
		}
	}
	// Five samples or more in the shortest window.
	every := min(max(shortWindow/time.Duration(scale)/6, 250*time.Millisecond), 15*time.Second)
	m.prometheus, err = m.run(ctx, "prometheus", paths[0], prometheusConfig(every, targets, m.alertmanager),
		"--storage.tsdb.path="+filepath.Join(m.dir, "prometheus"), "--rules.alert.resend-delay=1s", "--log.level=warn")
	return m, err
}

func prometheusConfig(every time.Duration, targets []string, alertmanager string) string {
	quoted := make([]string, len(targets))
	for i, t := range targets {
		quoted[i] = fmt.Sprintf("%q", t)
	}
	return fmt.Sprintf(`global:
  scrape_interval: %[1]s
  scrape_timeout: %[1]s
  evaluation_interval: %[1]s
rule_files: ["*.rules.yml"]
alerting:
  alertmanagers:
    - static_configs: [{targets: [%[2]q]}]
scrape_configs:
  - job_name: drill
    static_configs: [{targets: [%[3]s]}]
`, promText(every), strings.TrimPrefix(alertmanager, "http://"), strings.Join(quoted, ", "))
}

func alertmanagerConfig(webhook string) string {
	return fmt.Sprintf(`route:
  receiver: nobody
  routes:
    - receiver: pager
      matchers: ['severity="page"']
      group_by: ['...']
      group_wait: 0s
      group_interval: 1s
      repeat_interval: 1h
receivers:
  - name: nobody
  - name: pager
    webhook_configs: [{url: "http://%s/", send_resolved: true}]
`, webhook)
}

// serve serves on a free loopback port until close and returns the address.
func (m *monitoring) serve(h http.Handler) (string, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}
	m.servers = append(m.servers, s)
	go func() { _ = s.Serve(l) }() // ends with close
	return l.Addr().String(), nil
}

// run starts a program and returns its base URL once it is ready. Its port is free when it
// is picked; who loses it to somebody else picks another.
func (m *monitoring) run(ctx context.Context, name, binary, config string, args ...string) (string, error) {
	path := filepath.Join(m.dir, name+".yml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return "", err
	}
	for try := 1; ; try++ {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return "", err
		}
		addr := l.Addr().String()
		_ = l.Close()
		log := filepath.Join(m.dir, fmt.Sprintf("%s-%d.log", name, try))
		out, err := os.Create(log)
		if err != nil {
			return "", err
		}
		cmd := exec.Command(binary, append([]string{"--config.file=" + path, "--web.listen-address=" + addr}, args...)...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = m.dir, out, out
		p, err := redistest.StartProgram(cmd)
		_ = out.Close() // the child has its own descriptor
		if err != nil {
			return "", fmt.Errorf("starting %s: %w", binary, err)
		}
		m.programs = append(m.programs, p)
		err = m.awaitReady(ctx, p, "http://"+addr)
		if err == nil {
			return "http://" + addr, nil
		}
		text, _ := os.ReadFile(log) // what it said is more than nothing
		if !strings.Contains(string(text), "address already in use") || try == 3 {
			return "", fmt.Errorf("%s: %w; its log:\n%s", binary, err, text)
		}
	}
}

func (m *monitoring) awaitReady(ctx context.Context, p *redistest.Program, base string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		err := m.get(ctx, base+"/-/ready", nil)
		if err == nil {
			return nil
		}
		select {
		case <-p.Exited():
			return errors.New("it ended at once")
		case <-ctx.Done():
			return fmt.Errorf("it is not ready: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// get reads JSON into v, or nothing if that is nil.
func (m *monitoring) get(ctx context.Context, from string, v any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return err
	}
	resp, err := m.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", from, resp.Status)
	}
	if v == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(v)
}

// active is how many alerts with severity=page Prometheus has, pending ones included.
func (m *monitoring) active(ctx context.Context) (int, error) {
	var reply struct {
		Data struct {
			Alerts []struct{ Labels map[string]string }
		}
	}
	if err := m.get(ctx, m.prometheus+"/api/v1/alerts", &reply); err != nil {
		return 0, err
	}
	n := 0
	for _, a := range reply.Data.Alerts {
		if a.Labels["severity"] == "page" {
			n++
		}
	}
	return n, nil
}

// sees says whether every rule has been evaluated and every instance scraped.
func (m *monitoring) sees(ctx context.Context) (bool, error) {
	var reply struct {
		Data struct {
			Groups []struct {
				Rules []struct{ LastError, Health string }
			}
		}
	}
	if err := m.get(ctx, m.prometheus+"/api/v1/rules", &reply); err != nil {
		return false, err
	}
	rules := 0
	for _, g := range reply.Data.Groups {
		for _, r := range g.Rules {
			if r.Health == "err" {
				return false, fmt.Errorf("a rule cannot be evaluated: %s", r.LastError)
			}
			if r.Health != "ok" {
				return false, nil
			}
			rules++
		}
	}
	var result struct {
		Data struct {
			Result []json.RawMessage
		}
	}
	query := url.QueryEscape(`ratelimiter_slo_events_total{slo_name="redis_availability"} > 0`)
	if err := m.get(ctx, m.prometheus+"/api/v1/query?query="+query, &result); err != nil {
		return false, err
	}
	return rules > 0 && len(result.Data.Result) == m.apps, nil
}

// close ends everything and removes the directory.
func (m *monitoring) close() {
	var wg sync.WaitGroup
	for _, p := range m.programs {
		wg.Go(p.Stop)
	}
	wg.Wait()
	for _, s := range m.servers {
		_ = s.Close()
	}
	m.client.CloseIdleConnections()
	if m.dir != "" {
		_ = os.RemoveAll(m.dir)
	}
}

// page is one alert as Alertmanager delivered it.
type page struct {
	labels, annotations map[string]string
	fired, resolved     time.Time // when it was delivered; zero if it was not
}

// name is the alert and what tells it from others of its name.
func (p page) name() string {
	s := p.labels["alertname"]
	var more []string
	for _, k := range []string{"slo_name", "shard_id", "long", "short"} {
		if v := p.labels[k]; v != "" {
			more = append(more, k+"="+v)
		}
	}
	if len(more) > 0 {
		s += " (" + strings.Join(more, ", ") + ")"
	}
	return s
}

// pager receives Alertmanager's webhooks. All methods may be called from many goroutines.
type pager struct {
	mu    sync.Mutex // guards the following
	pages map[string]*page
	news  []string // fingerprints of what has changed and was not told yet
}

func newPager() *pager { return &pager{pages: map[string]*page{}} }

// maxPages bounds what is kept; the shipped rules have fewer alerts.
const maxPages = 1000

// ServeHTTP implements http.Handler.
func (p *pager) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var message struct {
		Alerts []struct {
			Status, Fingerprint string
			Labels, Annotations map[string]string
		}
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&message); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for _, a := range message.Alerts {
		known := p.pages[a.Fingerprint]
		if known == nil {
			if len(p.pages) >= maxPages {
				continue
			}
			known = &page{labels: a.Labels, annotations: a.Annotations}
			p.pages[a.Fingerprint] = known
		}
		switch {
		case a.Status == "firing" && (known.fired.IsZero() || !known.resolved.IsZero()):
			known.fired, known.resolved = now, time.Time{}
		case a.Status == "resolved" && known.resolved.IsZero():
			known.resolved = now
		default:
			continue
		}
		p.news = append(p.news, a.Fingerprint)
	}
}

// changed takes out what has fired or resolved since it was last called.
func (p *pager) changed() []page {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []page
	for _, f := range p.news {
		out = append(out, *p.pages[f])
	}
	p.news = nil
	return out
}

// all returns the pages in the order in which they fired.
func (p *pager) all() []page {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []page
	for _, one := range p.pages {
		out = append(out, *one)
	}
	slices.SortFunc(out, func(a, b page) int { return a.fired.Compare(b.fired) })
	return out
}
