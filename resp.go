package ringfence

import (
	"fmt"
	"strconv"
)

// This file is the Redis protocol (RESP2), as much of it as an operation needs: commands
// of bulk strings out, and in an integer, an array of integers or an error. What comes in
// is believed only as far as it is the one reply that can come.

// serverError is what a server answered instead of a reply.
type serverError string

// Error is the server's words, without the leading "-".
func (e serverError) Error() string { return string(e) }

// RedisError tells go-redis's helpers, and classify, that a server said it.
func (serverError) RedisError() {}

const (
	maxErrorLine = 4 << 10  // of an error; what is longer is no error of Redis
	maxGreeting  = 16 << 10 // of the reply to HELLO
)

// appendCount appends the head of an array of n, as of a command of n words.
func appendCount(b []byte, n int) []byte {
	b = append(b, '*')
	b = strconv.AppendInt(b, int64(n), 10)
	return append(b, '\r', '\n')
}

func appendBulkHead(b []byte, n int) []byte {
	b = append(b, '$')
	b = strconv.AppendInt(b, int64(n), 10)
	return append(b, '\r', '\n')
}

// appendBulk appends one word.
func appendBulk[T string | []byte](b []byte, word T) []byte {
	b = appendBulkHead(b, len(word))
	b = append(b, word...)
	return append(b, '\r', '\n')
}

// smallBulks are the numbers most calls carry, as words.
var smallBulks = func() (out [1024]string) {
	for i := range out {
		out[i] = string(appendBulk(nil, strconv.Itoa(i)))
	}
	return out
}()

// appendNumber appends one word that is a number.
func appendNumber(b []byte, v int64) []byte {
	if v >= 0 && v < int64(len(smallBulks)) {
		return append(b, smallBulks[v]...)
	}
	var digits [20]byte
	return appendBulk(b, strconv.AppendInt(digits[:0], v, 10))
}

// appendScriptCall appends one script call: EVALSHA and its like with a digest, or EVAL
// with the text. brief says that the script takes the short form; limits is scratch space
// for the table of limits.
func appendScriptCall(b []byte, command, script string, brief bool, reqs []*request, limits []*rule) ([]byte, []*rule) {
	if brief && saidBriefly(reqs) {
		r, values := reqs[0], 3
		if r.count != 1 {
			values++
		}
		b = appendCount(b, 3+len(reqs)+values)
		b = appendKeys(b, command, script, reqs)
		b = append(b, r.rule.brief...)
		b = appendNumber(b, r.cost*r.rule.p)
		if r.count != 1 {
			b = appendNumber(b, r.count)
		}
		return b, limits
	}
	for i, r := range reqs {
		if i > 0 && r.rule == reqs[i-1].rule { // most batches are of one limiter
			r.limit = reqs[i-1].limit
			continue
		}
		r.limit = -1
		for j, l := range limits {
			if l == r.rule {
				r.limit = j
				break
			}
		}
		if r.limit < 0 {
			r.limit = len(limits)
			limits = append(limits, r.rule)
		}
	}
	values := 4 + len(reqs) + len(limits)*limitArgs
	for rest := reqs; len(rest) > 0; {
		n, each := nextRun(rest)
		if values += runArgs; each {
			values += n * eachArgs
		}
		rest = rest[n:]
	}
	b = appendCount(b, values)
	b = appendKeys(b, command, script, reqs)
	b = appendNumber(b, int64(len(limits)))
	for _, l := range limits {
		b = append(b, l.words...)
	}
	for len(reqs) > 0 {
		r := reqs[0]
		n, each := nextRun(reqs)
		b = appendNumber(b, int64(n))
		b = appendNumber(b, int64(r.limit+1))
		b = appendNumber(b, r.cost)
		b = appendNumber(b, r.count)
		if each {
			b = append(b, smallBulks[0]...)
			b = appendBulk(b, "")
			for _, r := range reqs[:n] {
				b = r.appendOwn(b)
			}
		} else {
			b = r.appendOwn(b)
		}
		reqs = reqs[n:]
	}
	return b, limits
}

// appendOwn appends what is taken ahead and what there is to tell.
func (r *request) appendOwn(b []byte) []byte {
	if b = appendNumber(b, r.more()); r.debit == "" {
		return append(b, smallBulks[0]...)
	}
	return appendBulk(b, r.debit)
}

// appendKeys appends a script call up to the keys.
func appendKeys(b []byte, command, script string, reqs []*request) []byte {
	b = appendBulk(b, command)
	b = appendBulk(b, script)
	b = appendNumber(b, int64(len(reqs)))
	for _, r := range reqs {
		b = appendBulk(b, r.key())
	}
	return b
}

// appendUnlink appends one UNLINK.
func appendUnlink(b []byte, reqs []*request) []byte {
	b = appendCount(b, 1+len(reqs))
	b = appendBulk(b, "unlink")
	for _, r := range reqs {
		b = appendBulk(b, r.key())
	}
	return b
}

// replyReader reads replies, one after another, out of bytes that arrive piece by piece: an
// error each, or the integers of a reply to so many entries, or, where entries is below 0, a
// single one.
type replyReader struct {
	entries int
	want    int  // integers, once it is known
	last    bool // nothing may come after it
	from    int  // where it begins
	at      int  // bytes read so far
	head    bool
	values  []int64
	failed  error // the server's error: the reply
}

// reset begins anew with the first byte.
func (p *replyReader) reset() { p.at = 0 }

// next goes on to the next reply, the last one or not.
func (p *replyReader) next(entries int, last bool) {
	p.entries, p.last, p.from, p.head, p.values, p.failed = entries, last, p.at, false, p.values[:0], nil
}

// most is the longest that the reply can be.
func (p *replyReader) most() int {
	const number = 1 + 20 + 2
	return max(maxErrorLine, number*(1+replyHead+replyWide*max(0, p.entries)))
}

// read goes on with what has arrived, all of it from the first byte, and says whether the
// reply is whole. An error means that it is none.
func (p *replyReader) read(b []byte) (whole bool, err error) {
	for {
		if p.head && len(p.values) == p.want {
			return p.ends(b)
		}
		if p.at >= len(b) {
			return false, nil
		}
		kind := b[p.at]
		if kind == '-' && !p.head {
			return p.readError(b)
		}
		n, next, err := readNumber(b, p.at+1)
		if err != nil || next < 0 {
			return false, err
		}
		switch {
		case !p.head && p.entries >= 0:
			if kind != '*' || replyWidth(n, p.entries) == 0 {
				return false, fmt.Errorf("%w: it begins with %q and %d, want an array for %d entries", errProtocol, kind, n, p.entries)
			}
			p.head, p.want = true, int(n)
		case kind != ':':
			return false, fmt.Errorf("%w: it has %q where an integer is due", errProtocol, kind)
		default:
			if !p.head {
				p.head, p.want = true, 1
			}
			p.values = append(p.values, n)
		}
		p.at = next
	}
}

// ends says that the reply is whole, or too long.
func (p *replyReader) ends(b []byte) (whole bool, err error) {
	if p.last && p.at != len(b) {
		return false, fmt.Errorf("%w: %d bytes after its end", errProtocol, len(b)-p.at)
	}
	return true, nil
}

func (p *replyReader) readError(b []byte) (whole bool, err error) {
	line, next := readLine(b, p.at+1)
	if next < 0 && len(b)-p.at < maxErrorLine {
		return false, nil
	}
	if next < 0 || next-p.at > maxErrorLine {
		return false, fmt.Errorf("%w: an error of more than %d bytes", errProtocol, maxErrorLine)
	}
	p.failed, p.at = serverError(line), next
	return p.ends(b)
}

// readLine returns the line that begins at from and where the next one does, or -1 if it
// has not arrived whole.
func readLine(b []byte, from int) (line []byte, next int) {
	for i := from; i+1 < len(b); i++ {
		if b[i] == '\r' && b[i+1] == '\n' {
			return b[from:i], i + 2
		}
	}
	return nil, -1
}

// readNumber reads the rest of a line as a number in the one form Redis writes it. next is
// -1 if the line has not arrived whole.
func readNumber(b []byte, from int) (n int64, next int, err error) {
	i := from
	negative := i < len(b) && b[i] == '-'
	if negative {
		i++
	}
	digits := i
	for ; i < len(b) && b[i] >= '0' && b[i] <= '9'; i++ {
		if i-digits >= 18 {
			return 0, -1, fmt.Errorf("%w: a number of more than 18 digits", errProtocol)
		}
		n = n*10 + int64(b[i]-'0')
	}
	if i+1 >= len(b) {
		if i < len(b) && b[i] != '\r' {
			return 0, -1, fmt.Errorf("%w: %q in a number", errProtocol, b[i])
		}
		return 0, -1, nil
	}
	if i == digits || b[i] != '\r' || b[i+1] != '\n' {
		return 0, -1, fmt.Errorf("%w: %q in a number", errProtocol, b[i])
	}
	if b[digits] == '0' && (negative || i > digits+1) {
		return 0, -1, fmt.Errorf("%w: a number that begins with 0", errProtocol)
	}
	if negative {
		n = -n
	}
	return n, i + 2, nil
}

// skipReply returns where the reply that begins at from ends, whatever it is, or -1 if it
// has not arrived whole. failed is the server's error, if it is one.
func skipReply(b []byte, from, depth int) (next int, failed, err error) {
	if from >= len(b) {
		return -1, nil, nil
	}
	switch b[from] {
	case '+', ':', '-':
		line, next := readLine(b, from+1)
		if next >= 0 && b[from] == '-' {
			failed = serverError(line)
		}
		return next, failed, nil
	case '$':
		n, next, err := readNumber(b, from+1)
		switch {
		case err != nil || next < 0:
			return -1, nil, err
		case n == -1:
			return next, nil, nil
		case n < 0 || n > maxGreeting:
			return -1, nil, fmt.Errorf("%w: a string of %d bytes", errProtocol, n)
		case next+int(n)+2 > len(b):
			return -1, nil, nil
		}
		return next + int(n) + 2, nil, nil
	case '*':
		n, next, err := readNumber(b, from+1)
		if err != nil || next < 0 {
			return -1, nil, err
		}
		if depth == 0 || n > maxGreeting/4 {
			return -1, nil, fmt.Errorf("%w: an array too large", errProtocol)
		}
		for ; n > 0; n-- {
			if next, _, err = skipReply(b, next, depth-1); err != nil || next < 0 {
				return -1, nil, err
			}
		}
		return next, nil, nil
	}
	return -1, nil, fmt.Errorf("%w: it begins with %q", errProtocol, b[from])
}
