package observability_test

import "fmt"

// leases are what processes export of a limiter with leases: of n processes each takes bound
// units of a key ahead at most, and holds held of all keys. Its capacity is 1,000.
func leases(into map[string]string, e thing, processes, n int, bound, held func(i int) float64) {
	for p := range processes {
		e.instance = fmt.Sprint("p", p)
		l := `{` + e.process() + `,limit="` + e.id + `"}`
		into[`ratelimiter_lease_bound`+l] = gauge(n, bound)
		into[`ratelimiter_lease_outstanding`+l] = gauge(n, held)
		into[`ratelimiter_limit_capacity`+l] = constant(n, 1000)
	}
}

// leaseCases: more than half of a limit may be held, and is, of all keys together.
func leaseCases() (cases []ruleCase) {
	const processes, half = 10, 50.0 // units of a process
	times := func(v float64, x func(i int) float64) func(i int) float64 {
		return func(i int) float64 { return v * x(i) }
	}
	overshoot := causeSpec{alert: "RingfenceLeaseOvershoot", id: "limit", forN: 30,
		put: func(into map[string]string, e thing, n int, x func(i int) float64) {
			leases(into, e, processes, n, times(half, x), same(20*half))
		}}
	cases = append(cases, overshoot.cases()...)

	const n = 40
	add := func(name string, series map[string]string, checks ...ruleCheck) {
		cases = append(cases, ruleCase{overshoot.alert + ": " + name, overshoot.alert, 1, series, checks})
	}
	// What is held decides, when the bounds would allow more.
	for x, yes := range map[float64]bool{0: false, 0.99: false, 1: false, 1.01: true} {
		s := map[string]string{}
		leases(s, concerned, processes, n, same(1.6*half), same(half*x))
		for _, o := range others {
			leases(s, o, processes, n, same(1.6*half), same(0))
		}
		add(fmt.Sprintf("%.2f of a half is held", x), s, overshoot.fires(29, false), overshoot.fires(n-1, yes))
	}
	// Each keeps to a tenth: five come to a half, and a sixth is too many.
	for p, yes := range map[int]bool{5: false, 6: true} {
		s := map[string]string{}
		leases(s, concerned, p, n, same(100), same(5000))
		add(fmt.Sprintf("%d processes with a tenth each", p), s, overshoot.fires(n-1, yes))
	}
	// In a deployment there are twice as many for a while; in a larger one they stay.
	for minutes, yes := range map[int]bool{20: false, 45: true} {
		s := map[string]string{}
		leases(s, concerned, 4, 2*n, same(100), same(200))
		for p := range 4 {
			e := concerned
			e.instance = fmt.Sprint("new", p)
			l := `{` + e.process() + `,limit="s0"}`
			for name, v := range map[string]float64{"lease_bound": 100, "lease_outstanding": 200, "limit_capacity": 1000} {
				s["ratelimiter_"+name+l] = "_x10 " + constant(minutes, v) + " stale"
			}
		}
		add(fmt.Sprintf("twice as many processes for %d minutes", minutes), s,
			overshoot.fires(9, false), overshoot.fires(10+30, yes), overshoot.fires(10+minutes-1, yes), overshoot.fires(10+minutes+1, false), overshoot.fires(2*n-1, false))
	}
	// Processes without leases export nothing about them, and add nothing.
	s := map[string]string{}
	leases(s, concerned, 6, n, same(100), same(200))
	e := concerned
	e.instance = "plain"
	s[`ratelimiter_limit_capacity{`+e.process()+`,limit="s0"}`] = constant(n, 1000)
	add("a process without leases", s, overshoot.fires(n-1, true))
	for _, missing := range []string{"lease_bound", "lease_outstanding", "limit_capacity"} {
		s := map[string]string{}
		leases(s, concerned, 10, n, same(100), same(200))
		for p := range 10 {
			e.instance = fmt.Sprint("p", p)
			delete(s, `ratelimiter_`+missing+`{`+e.process()+`,limit="s0"}`)
		}
		add("without "+missing, s, overshoot.fires(n-1, false))
	}
	return cases
}
