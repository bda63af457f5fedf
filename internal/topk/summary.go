// Package topk finds the most frequent keys of a stream in bounded memory.
package topk

import "strings"

// counter is what is known of one key: its true weight is in [count-over, count].
type counter struct {
	key         string
	count, over uint64
}

// Summary is the algorithm Space-Saving (Metwally, Agrawal, El Abbadi: "Efficient
// Computation of Frequent and Top-k Elements in Data Streams", ICDT 2005), with weights:
// a fixed number of counters, and a key that has none takes over the smallest, whose count
// becomes its possible excess. So, of a stream of total weight N on m counters,
//
//   - no count is below the true weight,
//   - none is above it by more than N/m,
//   - every key that weighs more than N/m has a counter.
//
// The counters are a heap, smallest first. It is not safe for concurrent use.
type Summary struct {
	max   int
	total uint64
	index map[string]int // where in heap
	heap  []counter
}

// NewSummary returns a Summary of m counters, at least 1. They are allocated as needed.
func NewSummary(m int) *Summary {
	return &Summary{max: max(1, m), index: map[string]int{}}
}

// Add counts a key with a weight. The key is copied when it gets a counter: a short key
// may be a part of a request of a megabyte, which must not be kept.
func (s *Summary) Add(key string, weight uint64) {
	s.total += weight
	if i, known := s.index[key]; known {
		s.heap[i].count += weight
		s.down(i)
		return
	}
	key = strings.Clone(key)
	if len(s.heap) < s.max {
		s.heap = append(s.heap, counter{key: key, count: weight})
		s.index[key] = len(s.heap) - 1
		s.up(len(s.heap) - 1)
		return
	}
	least := &s.heap[0]
	delete(s.index, least.key)
	*least = counter{key: key, count: least.count + weight, over: least.count}
	s.index[key] = 0
	s.down(0)
}

// Total is the weight of all that was added.
func (s *Summary) Total() uint64 { return s.total }

// Unseen is the most that a key without a counter can weigh.
func (s *Summary) Unseen() uint64 {
	if len(s.heap) < s.max {
		return 0
	}
	return s.heap[0].count
}

// Reset forgets everything, keys included.
func (s *Summary) Reset() {
	clear(s.index)
	clear(s.heap)
	s.heap, s.total = s.heap[:0], 0
}

func (s *Summary) swap(i, j int) {
	s.heap[i], s.heap[j] = s.heap[j], s.heap[i]
	s.index[s.heap[i].key], s.index[s.heap[j].key] = i, j
}

func (s *Summary) up(i int) {
	for i > 0 {
		parent := (i - 1) / 2
		if s.heap[parent].count <= s.heap[i].count {
			return
		}
		s.swap(parent, i)
		i = parent
	}
}

func (s *Summary) down(i int) {
	for {
		least := i
		for child := 2*i + 1; child <= 2*i+2 && child < len(s.heap); child++ {
			if s.heap[child].count < s.heap[least].count {
				least = child
			}
		}
		if least == i {
			return
		}
		s.swap(i, least)
		i = least
	}
}
