package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/ringfence/ringfence"
)

// result is what the demo has seen: all that the verdict is made of.
type result struct {
	limit      int
	budget     time.Duration
	apps       int
	replicated bool
	victim     string // the shard that was killed
	groups     []group
	// toOpen is from the kill until the breakers of all apps were open, toClose from the
	// return of the server until all were closed; below 0: they never were.
	toOpen, toClose time.Duration
	// outage has the times of the answers for the victim's users after the kill.
	outage tally
}

// group is the users of some shards in one phase.
type group struct {
	phase  int
	title  string // of the phase
	shards string // whose users
	// exact says that a primary must have given every answer, and that every user must
	// have been admitted to the limit: the shards are healthy.
	exact bool
	users []userResult
	tally
}

// userResult is one user in one phase.
type userResult struct {
	name string
	// quota is what was left of the limit when the phase began.
	quota int
	count
}

// want is what exactness means: all are admitted until the quota is used up.
func (u userResult) want() int { return min(u.asked, u.quota) }

func (g group) sum(f func(userResult) int) int {
	n := 0
	for _, u := range g.users {
		n += f(u)
	}
	return n
}

func (g group) asked() int    { return g.sum(func(u userResult) int { return u.asked }) }
func (g group) quota() int    { return g.sum(func(u userResult) int { return u.quota }) }
func (g group) admitted() int { return g.sum(func(u userResult) int { return u.admitted }) }
func (g group) off() int      { return g.sum(func(u userResult) int { return u.admitted - u.want() }) }

// notPrimary is how many answers did not come from a primary.
func (g group) notPrimary() int { return g.answers() - g.source[ringfence.SourcePrimary] }

// The phases, by number.
const (
	phaseHealthy = iota + 1
	phaseKilled
	phaseBack
	phaseAgain
)

// finding is one sentence of the verdict.
type finding struct {
	mark string // ok, note or FAIL
	text string
}

func (f finding) failed() bool { return f.mark == "FAIL" }

// verdict judges the result. The demo has failed if any finding has.
func (r result) verdict() []finding {
	var out []finding
	ok := func(format string, args ...any) { out = append(out, finding{"ok", fmt.Sprintf(format, args...)}) }
	note := func(format string, args ...any) { out = append(out, finding{"note", fmt.Sprintf(format, args...)}) }
	fail := func(format string, args ...any) { out = append(out, finding{"FAIL", fmt.Sprintf(format, args...)}) }

	errors := 0
	for phase := phaseHealthy; phase <= phaseAgain; phase++ {
		g, found := r.find(phase, true)
		if !found {
			fail("phase %d was not played", phase)
			continue
		}
		r.judgeExact(g, ok, fail)
		switch phase {
		case phaseKilled:
			r.judgeOutage(ok, note, fail)
		case phaseBack:
			r.judgeReturn(ok, note, fail)
		}
	}
	for _, g := range r.groups {
		errors += g.errors
	}
	if errors > 0 {
		fail("callers saw %d errors; Redis being down must never be one", errors)
	} else {
		ok("no caller saw an error, in any phase")
	}
	return out
}

type sayFunc func(format string, args ...any)

// judgeExact judges users whose shards were healthy.
func (r result) judgeExact(g group, ok, fail sayFunc) {
	wrong, worst := 0, userResult{}
	for _, u := range g.users {
		if u.admitted != u.want() {
			wrong, worst = wrong+1, u
		}
	}
	switch {
	case g.asked() == 0:
		fail("phase %d, %s: nobody called, so nothing is proved", g.phase, g.shards)
	case g.notPrimary() > g.errors:
		fail("phase %d, %s: %d answers did not come from a primary although the shards were up (%s)",
			g.phase, g.shards, g.notPrimary()-g.errors, sources(g.tally))
	}
	switch {
	case wrong > 0:
		fail("phase %d, %s: %d users were not limited exactly; %s called %d times, had %d left and was admitted %d times",
			g.phase, g.shards, wrong, worst.name, worst.asked, worst.quota, worst.admitted)
	case g.asked() == 0 || g.notPrimary() > 0:
	case g.quota() == 0:
		ok("phase %d, %s: exact. The users had used up their limit, and of %d calls none was admitted; every answer came from a primary",
			g.phase, g.shards, g.asked())
	case g.admitted() == g.quota():
		ok("phase %d, %s: exact. Of %d calls %d were admitted = %d users x %d; every answer came from a primary",
			g.phase, g.shards, g.asked(), g.admitted(), len(g.users), r.limit)
	default:
		ok("phase %d, %s: exact. Of %d calls %d were admitted; the machine is too slow for every user to ask for the whole limit",
			g.phase, g.shards, g.asked(), g.admitted())
	}
}

// judgeOutage judges the users of the shard that was killed.
func (r result) judgeOutage(ok, note, fail sayFunc) {
	g, found := r.find(phaseKilled, false)
	if !found || g.notPrimary() == 0 {
		fail("phase %d: nobody noticed the loss of %s, so nothing is proved about it", phaseKilled, r.victim)
		return
	}
	// Before the kill a user gets the limit at most, and after it the apps' parts, which
	// add up to the limit.
	for _, u := range g.users {
		if u.admitted > 2*r.limit {
			fail("phase %d: %s was admitted %d times, more than twice the limit of %d", g.phase, u.name, u.admitted, r.limit)
			break
		}
	}
	why := fmt.Sprintf("without a replica nobody knows what was used before, so each app admits a %s of the limit from its own memory (policy Local)", ordinal(r.apps))
	if r.replicated {
		why = fmt.Sprintf("its replica knows what was used, and each app admits a %s of what was left; what was on the way when it died may be missing", ordinal(r.apps))
	}
	note("phase %d: %s was dead, and its users were admitted %d times where the limit is %d (%s): %s",
		g.phase, r.victim, g.admitted(), g.quota(), deviation(g.off(), g.quota()), why)
	if r.toOpen < 0 {
		fail("phase %d: the circuit breakers of %s did not open", g.phase, r.victim)
		return
	}
	say, how := ok, "callers went on"
	if r.outage.percentile(0.99) > 2*r.budget { // the budget, and as much for a slow machine
		say, how = fail, "callers had to wait"
	}
	say("phase %d: %s. With the shard dead, half of its users' calls were answered within %s, 99 %% within %s, all within %s; the breakers of all apps were open %s after the kill",
		g.phase, how, short(r.outage.percentile(0.5)), short(r.outage.percentile(0.99)), short(r.outage.percentile(1)), short(r.toOpen))
}

// judgeReturn judges whether the apps found the shard again.
func (r result) judgeReturn(ok, note, fail sayFunc) {
	g, found := r.find(phaseBack, false)
	if !found || r.toClose < 0 {
		fail("phase %d: %s came back, but not every app had returned to it when the phase was over", phaseBack, r.victim)
		return
	}
	ok("phase %d: the breakers closed by themselves, the last one %s after %s was back", g.phase, short(r.toClose), r.victim)
	note("phase %d: %s came back empty, so the limit began afresh for its users: %d more calls were admitted",
		g.phase, r.victim, g.admitted())
}

func (r result) find(phase int, exact bool) (group, bool) {
	for _, g := range r.groups {
		if g.phase == phase && g.exact == exact {
			return g, true
		}
	}
	return group{}, false
}

func ordinal(n int) string {
	switch n {
	case 2:
		return "half"
	case 3:
		return "third"
	case 4:
		return "quarter"
	default:
		return fmt.Sprintf("%dth", n)
	}
}

// deviation prints how far off a count is, as in "+160 off, +40 %".
func deviation(off, of int) string {
	if of == 0 || off == 0 {
		return signed(off) + " off"
	}
	part := 100 * float64(off) / float64(of)
	if -10 < part && part < 10 {
		return fmt.Sprintf("%+d off, %+.1f %%", off, part)
	}
	return fmt.Sprintf("%+d off, %+.0f %%", off, part)
}

// lines draws the summary: the table and the findings.
func (r result) lines(p palette, took time.Duration) []string {
	row := func(name, asked, quota, admitted, off, primary, replica, local, policy string) string {
		return fmt.Sprintf("%-20s%6s%7s%9s%6s%8s%8s%7s%8s", name, asked, quota, admitted, off, primary, replica, local, policy)
	}
	out := []string{
		"", p.bold("Summary"), "",
		p.faint(fmt.Sprintf("%-50s%s", "", "  answered by")),
		p.faint(row("users of", "calls", "quota", "admitted", "off", "primary", "replica", "local", "policy")),
	}
	phase := 0
	for _, g := range r.groups {
		if g.phase != phase {
			phase = g.phase
			out = append(out, fmt.Sprintf("%d %s", g.phase, g.title))
		}
		number := func(n int) string { return fmt.Sprint(n) }
		line := row("  "+g.shards, number(g.asked()), number(g.quota()), number(g.admitted()), signed(g.off()),
			number(g.source[ringfence.SourcePrimary]), number(g.source[ringfence.SourceReplica]),
			number(g.source[ringfence.SourceLocal]), number(g.source[ringfence.SourcePolicy]))
		if !g.exact {
			line = p.yellow(line)
		}
		out = append(out, line)
	}
	out = append(out, "",
		p.faint("quota: what the users had left when the phase began; off: admitted beyond it"), "")
	failed := 0
	for _, f := range r.verdict() {
		lines := wrap(fmt.Sprintf(" %-5s ", f.mark), f.text)
		lines[0] = f.paint(p, lines[0])
		out = append(out, lines...)
		if f.failed() {
			failed++
		}
	}
	last := p.green("The demo held what it promises") + fmt.Sprintf(" (%.1f s).", took.Seconds())
	if failed > 0 {
		last = p.red("The demo did not hold what it promises") + fmt.Sprintf(": see FAIL above (%.1f s).", took.Seconds())
	}
	return append(out, "", last)
}

// paint colours the mark at the beginning of a line.
func (f finding) paint(p palette, line string) string {
	paint := map[string]func(string) string{"ok": p.green, "note": p.yellow, "FAIL": p.red}[f.mark]
	return strings.Replace(line, f.mark, paint(f.mark), 1)
}

func signed(n int) string {
	if n == 0 {
		return "0"
	}
	return fmt.Sprintf("%+d", n)
}

// exitCode is 0 unless something failed.
func (r result) exitCode() int {
	for _, f := range r.verdict() {
		if f.failed() {
			return exitFailed
		}
	}
	return exitOK
}
