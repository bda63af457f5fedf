package ringfence

import (
	"crypto/sha1" // Redis names scripts by their SHA-1.
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

//go:embed scripts/head.lua
var headLua string

//go:embed scripts/usual.lua
var usualLua string

//go:embed scripts/shared.lua
var sharedLua string

//go:embed scripts/token_bucket.lua
var tokenBucketLua string

//go:embed scripts/sliding_log.lua
var slidingLogLua string

//go:embed scripts/frame.lua
var frameLua string

// scriptFiles are what scripts/frame.lua includes.
var scriptFiles = map[string]string{
	"head.lua": headLua, "usual.lua": usualLua, "shared.lua": sharedLua,
	"token_bucket.lua": tokenBucketLua, "sliding_log.lua": slidingLogLua,
}

// The arguments of the scripts; scripts/frame.lua is the description.
const (
	limitArgs   = 8 // values a limit has in the table
	runArgs     = 6 // values a run of entries has that ask for the same,
	eachArgs    = 2 // and those that an entry has where they do not quite
	replyHead   = 1 // the server's now
	replyNarrow = 2 // values an entry has in the reply, where none has more,
	replyWide   = 4 // and where one does
)

// script is one assembled script. shaArg is sha as an argument, boxed once; brief says that it
// takes the short form of a call, see saidBriefly.
type script struct {
	text, sha string
	shaArg    any
	brief     bool
}

// scripts are the scripts of a ring in the form one kind of server understands.
type scripts struct{ charge, look, beat script }

var (
	// redisScripts carry the line that lets Redis 7 and later check memory, role and
	// replicas before the first line runs.
	redisScripts = scripts{
		charge: assemble("#!lua\n", "charge"),
		look:   assemble("#!lua flags=no-writes\n", "look"),
		beat:   finish("#!lua\n" + withoutComments(instancesLua)),
	}
	// plainScripts are for servers that do not know that line: the embedded one.
	plainScripts = scripts{
		charge: assemble("", "charge"), look: assemble("", "look"), beat: finish(withoutComments(instancesLua)),
	}
)

// assemble puts together the script of that name, as scripts/frame.lua describes it.
func assemble(head, name string) script {
	var b strings.Builder
	include(&b, frameLua, name)
	s := finish(head + withoutComments(b.String()))
	s.brief = name == "charge"
	return s
}

// include writes what is the script's of a file.
func include(b *strings.Builder, text, name string) {
	part := "both"
	for line := range strings.Lines(text) {
		directive, isOne := strings.CutPrefix(strings.TrimSpace(line), "--@")
		file, isFile := strings.CutPrefix(directive, "include ")
		switch {
		case !isOne && (part == "both" || part == name):
			b.WriteString(line)
		case !isOne:
		case !isFile:
			part = directive
		case part == "both" || part == name:
			included, ok := scriptFiles[file]
			if !ok {
				panic("ringfence: a script includes " + file + ", which is not there")
			}
			include(b, included, name)
		}
	}
}

// withoutComments leaves out what Redis need not keep.
func withoutComments(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if code := strings.TrimSpace(line); code != "" && !strings.HasPrefix(code, "--") {
			b.WriteString(line)
		}
	}
	return b.String()
}

func finish(text string) script {
	sum := sha1.Sum([]byte(text))
	sha := hex.EncodeToString(sum[:])
	return script{text: text, sha: sha, shaArg: sha}
}

// The statuses of a reply entry.
const (
	statusDecided   = 0
	statusWrongType = 1
	statusCorrupt   = 2
	statusRefused   = 3
)

// smallNumbers are the numbers most calls carry, boxed once.
var smallNumbers = func() (n [1024]any) {
	for i := range n {
		n[i] = strconv.Itoa(i)
	}
	return n
}()

func numberArg(v int64) any {
	if v >= 0 && v < int64(len(smallNumbers)) {
		return smallNumbers[v]
	}
	return strconv.FormatInt(v, 10)
}

// saidBriefly says whether a charge is one run of usual entries of a bucket without fractions,
// which is said in fewer words: see scripts/frame.lua.
func saidBriefly(reqs []*request) bool {
	if len(reqs) == 0 { // a probe
		return false
	}
	r := reqs[0]
	return r.rule.brief != "" && r.debit == "" && r.more() == 0 && runOf(reqs) == len(reqs)
}

// appendArgs appends KEYS and ARGV of one script call, the number of keys first. brief says
// that the script takes the short form; limits is scratch space for the table of limits.
func appendArgs(args []any, brief bool, reqs []*request, limits []*rule) ([]any, []*rule) {
	args = append(args, numberArg(int64(len(reqs))))
	for _, r := range reqs {
		args = append(args, r)
	}
	if brief && saidBriefly(reqs) {
		r := reqs[0]
		args = append(args, r.rule.args[7], r.rule.args[4], numberArg(r.cost*r.rule.p))
		if r.count != 1 {
			args = append(args, numberArg(r.count))
		}
		return args, limits
	}
	for _, r := range reqs {
		r.limit = -1
		for i, l := range limits {
			if l == r.rule {
				r.limit = i
				break
			}
		}
		if r.limit < 0 {
			r.limit = len(limits)
			limits = append(limits, r.rule)
		}
	}
	args = append(args, numberArg(int64(len(limits))))
	for _, l := range limits {
		args = append(args, l.args[:]...)
	}
	for len(reqs) > 0 {
		r := reqs[0]
		n, each := nextRun(reqs)
		args = append(args, numberArg(int64(n)), numberArg(int64(r.limit+1)), numberArg(r.cost), numberArg(r.count))
		if each {
			args = append(args, smallNumbers[0], "")
			for _, r := range reqs[:n] {
				args = append(args, numberArg(r.more()), r.debitArg())
			}
		} else {
			args = append(args, numberArg(r.more()), r.debitArg())
		}
		reqs = reqs[n:]
	}
	return args, limits
}

// debitArg is debit as the scripts take it.
func (r *request) debitArg() any {
	if r.debit == "" {
		return smallNumbers[0]
	}
	return r.debit
}

// likes says whether two entries ask for the same, each of its own key.
func (r *request) likes(o *request) bool {
	return r.resembles(o) && r.more() == o.more() && r.debit == o.debit
}

// resembles is likes but for what is taken ahead and what there is to tell.
func (r *request) resembles(o *request) bool {
	return r.rule == o.rule && r.cost == o.cost && r.count == o.count
}

// runOf is how many of the entries, from the first on, ask for the same.
func runOf(reqs []*request) int {
	n := 1
	for n < len(reqs) && reqs[n].likes(reqs[0]) {
		n++
	}
	return n
}

// nextRun is how many of the entries, from the first on, are said in one run, and whether each
// of them says what is its own: as leases that are renewed do, of which each goes back with
// another number of units. Entries that are quite the same, a few at least, take fewer values
// without.
func nextRun(reqs []*request) (n int, each bool) {
	const aFew = runArgs / eachArgs
	if n = runOf(reqs); n >= aFew {
		return n, false
	}
	same := n
	for n < len(reqs) && reqs[n].resembles(reqs[0]) {
		more := runOf(reqs[n:])
		if more >= aFew {
			break
		}
		n += more
	}
	return n, n > same
}

var errProtocol = errors.New("ringfence: the reply is not one of these scripts'")

// replyEntry is entry i of a reply with so many values for each.
func replyEntry(reply []int64, width, i int) (status int, granted int64, s state) {
	e := reply[replyHead+i*width:][:width]
	if granted = e[0]; granted < 0 {
		status, granted = -int(max(granted, -statusRefused-1)), 0
	}
	if s.a = e[1]; width == replyWide {
		s.b, s.c = e[2], e[3]
	}
	return status, granted, s
}

// replyWidth is how many values a reply of so many has for each of n entries, 0 if it is none.
func replyWidth(values int64, n int) int {
	switch values {
	case replyHead + replyNarrow*int64(n):
		return replyNarrow
	case replyHead + replyWide*int64(n):
		return replyWide
	}
	return 0
}

// decodeReply puts the entries of a reply into the requests. It checks everything: a
// reply that is not whole fails the lot, rather than admitting anybody by accident.
func decodeReply(reply []int64, reqs []*request) error {
	width := replyWidth(int64(len(reply)), len(reqs))
	if width == 0 {
		return fmt.Errorf("%w: %d values for %d entries", errProtocol, len(reply), len(reqs))
	}
	now := reply[0]
	if now < 0 || now >= maxExact {
		return fmt.Errorf("%w: the server's clock shows %d us", errProtocol, now)
	}
	for i, r := range reqs {
		status, granted, s := replyEntry(reply, width, i)
		switch {
		case status > statusRefused || granted > r.count+r.more():
			return fmt.Errorf("%w: entry %d has status %d and %d granted", errProtocol, i, status, granted)
		case status != statusDecided && s != state{}:
			return fmt.Errorf("%w: entry %d has status %d and yet the state %v", errProtocol, i, status, s)
		case status == statusDecided && !r.rule.plausible(s):
			return fmt.Errorf("%w: entry %d has the state %v", errProtocol, i, s)
		}
	}
	for i, r := range reqs {
		r.now = now
		r.status, r.granted, r.state = replyEntry(reply, width, i)
	}
	return nil
}
