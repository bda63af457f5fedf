package main

// cellID names a cell.
type cellID struct{ fault, policy, algorithm string }

func (c cellID) String() string { return c.fault + "/" + c.policy + "/" + c.algorithm }

// The algorithms of the matrix.
const (
	tokenBucket = "token_bucket"
	slidingLog  = "sliding_log"
)

// cells are the cells of a fault.
func (f fault) cells() []cellID {
	policies := []string{policyOpen, policyClosed, policyLocal}
	if f.kind == lonePair {
		policies = append(policies, policyShare)
	}
	var out []cellID
	for _, p := range policies {
		for _, a := range []string{tokenBucket, slidingLog} {
			out = append(out, cellID{f.name, p, a})
		}
	}
	return out
}
