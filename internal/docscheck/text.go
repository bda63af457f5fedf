package docscheck

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"unicode"
)

var (
	inlineLink = regexp.MustCompile(`\]\(\s*<?([^)\s>]+)>?(?:\s+["'(][^)]*)?\)`)
	defined    = regexp.MustCompile(`^\s{0,3}\[[^\]]+\]:\s*<?([^\s>]+)>?`)
	htmlLink   = regexp.MustCompile(`\b(?:href|src)="([^"]+)"`)
	heading    = regexp.MustCompile(`^#{1,6}\s+(.*?)\s*#*\s*$`)
	htmlAnchor = regexp.MustCompile(`\b(?:id|name)="([^"]+)"`)
	madeLink   = regexp.MustCompile(`!?\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])`)
)

// Links checks that every relative link in a document leads to a file, and its
// fragment, if it has one, to a heading. Links to other hosts are not followed:
// a build must not fail because somebody else's server is down.
func Links(root string) ([]Problem, error) {
	docs, err := documents(root)
	if err != nil {
		return nil, err
	}
	anchors := map[string]map[string]bool{}
	for _, d := range docs {
		anchors[d.name] = d.anchors(root)
	}
	var bad []Problem
	for _, d := range docs {
		for i, line := range d.prose {
			for _, re := range []*regexp.Regexp{inlineLink, defined, htmlLink} {
				for _, m := range re.FindAllStringSubmatch(line, -1) {
					if why := checkLink(root, d.name, m[1], anchors); why != "" {
						bad = append(bad, Problem{d.name, i + 1, fmt.Sprintf("link to %s: %s", m[1], why)})
					}
				}
			}
		}
	}
	return bad, nil
}

func checkLink(root, from, link string, anchors map[string]map[string]bool) string {
	u, err := url.Parse(link)
	if err != nil {
		return err.Error()
	}
	if u.Scheme != "" || u.Host != "" {
		return ""
	}
	to := from
	if u.Path != "" {
		to = path.Join(path.Dir(from), u.Path)
		if strings.HasPrefix(u.Path, "/") { // as GitHub reads it: from the root
			to = path.Join(".", strings.TrimLeft(u.Path, "/"))
		}
	}
	if to == ".." || strings.HasPrefix(to, "../") {
		return "leads out of the repository"
	}
	if _, err := os.Stat(filepath.Join(root, to)); err != nil {
		return "no such file"
	}
	if known, ok := anchors[to]; ok && u.Fragment != "" && !known[strings.ToLower(u.Fragment)] {
		return "no such heading"
	}
	return ""
}

// anchors are the fragments that a link to the document may name: its headings
// in GitHub's spelling, and explicit ids.
func (d document) anchors(root string) map[string]bool {
	known := map[string]bool{}
	// A heading may hold code spans, which prose leaves out: read it as it is.
	text, _ := os.ReadFile(filepath.Join(root, d.name))
	raw := strings.Split(string(text), "\n")
	for i, line := range d.prose {
		for _, m := range htmlAnchor.FindAllStringSubmatch(line, -1) {
			known[strings.ToLower(m[1])] = true
		}
		if !strings.HasPrefix(line, "#") || i >= len(raw) {
			continue
		}
		m := heading.FindStringSubmatch(strings.TrimRight(raw[i], "\r"))
		if m == nil {
			continue
		}
		id := slug(madeLink.ReplaceAllString(m[1], "$1"))
		unique := id
		for n := 1; known[unique]; n++ {
			unique = fmt.Sprintf("%s-%d", id, n)
		}
		known[unique] = true
	}
	return known
}

// slug is GitHub's way from a heading to a fragment.
func slug(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsNumber(r):
			return unicode.ToLower(r)
		}
		return -1
	}, heading)
}

var (
	makeCommand = regexp.MustCompile(`^(?:\$ )?(?:[A-Z_]+=\S+ )*make((?: +[^\s#;&|]+)+)`)
	makeTarget  = regexp.MustCompile(`^([a-zA-Z][\w.-]*)\s*:(?:[^=]|$)`)
	targetName  = regexp.MustCompile(`^[a-z][\w.-]*$`)
)

// MakeTargets checks that every `make x` in the code of a document is a target
// of the Makefile at the root.
func MakeTargets(root string) ([]Problem, error) {
	text, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		return nil, err
	}
	known := map[string]bool{}
	for line := range strings.SplitSeq(string(text), "\n") {
		if m := makeTarget.FindStringSubmatch(line); m != nil {
			known[m[1]] = true
		}
	}
	docs, err := documents(root)
	if err != nil {
		return nil, err
	}
	var bad []Problem
	for _, d := range docs {
		for i, line := range d.code {
			for command := range strings.SplitSeq(line, "\n") {
				m := makeCommand.FindStringSubmatch(strings.TrimSpace(command))
				if m == nil || strings.Contains(m[1], " -C") {
					continue
				}
				for _, word := range strings.Fields(m[1]) {
					if targetName.MatchString(word) && !known[word] {
						bad = append(bad, Problem{d.name, i + 1, fmt.Sprintf("make %s: the Makefile has no such target", word)})
					}
				}
			}
		}
	}
	return bad, nil
}

var (
	// machinePath finds paths of the machine something was written on: in a
	// document they mean nothing to its reader.
	machinePath = regexp.MustCompile(`(?:^|[^\w./}-])(/(?:home|root|work|workspace|Users|tmp|private|mnt)/[\w.-]+)`)
	// buildPath finds the same where a plain /tmp or /home may be meant.
	buildPath = regexp.MustCompile(`(?:^|[^\w./}-])(/(?:work|tmp/wt)/(?:main|shared|[a-z]+\b))`)
	// packageHost finds the hosts that packages come from. Which one serves a
	// build is its builder's own affair.
	packageHost = regexp.MustCompile(`\b(?:(?:proxy|sum|index)\.golang\.org|(?:deb|security|snapshot)\.debian\.org|registry\.npmjs\.org|pypi\.org|artifactory[\w.-]*)\b`)
	word        = regexp.MustCompile(`\b[A-Za-z]+\b`)
)

// forbiddenWords are words of other trades that have no place in the text of a
// rate limiter: the beginnings of their SHA-256, in lower case, so that the
// list does not find itself. TestForbiddenWordsAreFound shows how to add one.
var forbiddenWords = map[string]bool{
	"053ea4804ef1bb33": true,
	"386ebc0efd04339a": true,
	"3ea125d0bff386e6": true,
	"487b91042c7cf27a": true,
	"57de4cf40144bdf7": true,
	"5d72436256ada538": true,
	"60965168ce762e94": true,
	"7d3194f79e645c42": true,
	"a39a7ffad4a3013f": true,
	"a5ea7d719f7aba21": true,
	"c70eca6b0f88f44d": true,
	"c857d09db23e6822": true,
	"de2187af3fb01170": true,
	"eea82f53ecaed277": true,
}

// forbiddenCapitals are the same for words that only count in capitals.
var forbiddenCapitals = map[string]bool{
	"11fb682be0a0233d": true,
}

func digest(word string) string {
	sum := sha256.Sum256([]byte(word))
	return hex.EncodeToString(sum[:8])
}

// ForbiddenWords looks for what no reader of the repository has a use for:
// paths of somebody's machine and hosts of package registries in documents, and
// forbidden words in every text file.
func ForbiddenWords(root string) ([]Problem, error) {
	// Checksums are no prose, the licence is not ours to word, and in a second
	// work tree .git is a file.
	skip := map[string]bool{".git": true, "go.sum": true, "go.work.sum": true, "go.mod": true, "LICENSE": true}
	names, err := files(root, func(rel string) bool { return !skip[path.Base(rel)] })
	if err != nil {
		return nil, err
	}
	var bad []Problem
	seen := map[string]bool{} // by word: hashing every word of the tree takes seconds
	for _, name := range names {
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return nil, err
		}
		if bytes.IndexByte(text[:min(len(text), 8000)], 0) >= 0 {
			continue // not text
		}
		for i, line := range strings.Split(string(text), "\n") {
			report := func(what, found string) {
				bad = append(bad, Problem{name, i + 1, fmt.Sprintf("%s: %s", what, found)})
			}
			paths := buildPath
			if isMarkdown(name) {
				paths = machinePath
				for _, m := range packageHost.FindAllString(line, -1) {
					report("host of a package registry", m)
				}
			}
			for _, m := range paths.FindAllStringSubmatch(line, -1) {
				report("path of somebody's machine", m[1])
			}
			for _, w := range word.FindAllString(line, -1) {
				hit, ok := seen[w]
				if !ok {
					hit = forbiddenWords[digest(strings.ToLower(w))] || forbiddenCapitals[digest(w)]
					seen[w] = hit
				}
				if hit {
					report("forbidden word", w)
				}
			}
		}
	}
	return bad, nil
}
