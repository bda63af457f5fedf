package redistest

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Slots is the number of hash slots of a Redis Cluster.
const Slots = 16384

// askBound is how long one node may take to say what it knows. A paused node
// costs that much.
const askBound = time.Second

// view is what one node knows of the cluster, by node id.
type view map[string]claim

// claim is one line of CLUSTER NODES.
type claim struct {
	self   bool   // the node speaks of itself
	master string // id of the node it replicates, empty for a master
	epoch  int64  // of two claims to a slot, the higher epoch wins
	slots  [][2]int
}

// view asks the node.
func (s *Server) view(ctx context.Context) (view, error) {
	raw, err := s.Client().ClusterNodes(ctx).Result()
	if err != nil {
		return nil, fmt.Errorf("asking %s for CLUSTER NODES: %w", s.Addr(), err)
	}
	return parseView(raw), nil
}

// parseView reads lines such as
//
//	07c3 127.0.0.1:7001@17001 myself,master - 0 1426238317239 4 connected 0-5460 9000 [93->-292f]
//
// and leaves out nodes that are still shaking hands: they have no id yet.
func parseView(raw string) view {
	v := view{}
	for line := range strings.Lines(raw) {
		f := strings.Fields(line)
		if len(f) < 8 || strings.Contains(f[2], "handshake") {
			continue
		}
		c := claim{self: strings.Contains(f[2], "myself"), epoch: number(f[6])}
		if f[3] != "-" {
			c.master = f[3]
		}
		for _, word := range f[8:] {
			first, last, isRange := strings.Cut(word, "-")
			low, err := strconv.Atoi(first)
			if err != nil {
				continue // "[93->-292f]": a slot on the move, still its owner's
			}
			high := low
			if isRange {
				high = int(number(last))
			}
			c.slots = append(c.slots, [2]int{low, high})
		}
		v[f[0]] = c
	}
	return v
}

// layout is what the views say together.
type layout struct {
	owner    [Slots]string     // node ids; empty: nobody
	masterOf map[string]string // of each node that anybody knows; empty: none
}

// merge takes each node at its own word, others' where it cannot be asked, and
// settles quarrels over a slot as Redis does, by epoch.
func (c *Cluster) merge(views []view) layout {
	said := map[string][]claim{}
	for _, v := range views {
		for id, next := range v {
			if before := said[id]; len(before) > 0 && before[0].self {
				continue
			}
			if next.self {
				said[id] = nil
			}
			said[id] = append(said[id], next)
		}
	}
	l := layout{masterOf: map[string]string{}}
	var epochs [Slots]int64
	for id, claims := range said {
		newest := slices.MaxFunc(claims, func(a, b claim) int { return int(a.epoch - b.epoch) })
		l.masterOf[id] = newest.master
		for _, claim := range claims {
			for _, r := range claim.slots {
				for slot := r[0]; slot <= r[1]; slot++ {
					if l.owner[slot] == "" || claim.epoch > epochs[slot] {
						l.owner[slot], epochs[slot] = id, claim.epoch
					}
				}
			}
		}
	}
	return l
}

// look asks every running node; those that do not answer are spoken for by the
// others.
func (c *Cluster) look(ctx context.Context) layout {
	ctx, cancel := context.WithTimeout(ctx, askBound)
	defer cancel()
	views := make([]view, len(c.nodes))
	_ = atOnce(len(c.nodes), func(i int) (err error) {
		if c.nodes[i].Running() {
			views[i], err = c.nodes[i].view(ctx)
		}
		return err
	})
	return c.merge(views)
}

// Masters returns the nodes that own slots now, in the order of Nodes. A killed
// master stays one until a replica has taken over. A node that is paused is
// waited for up to a second.
func (c *Cluster) Masters() []*Server {
	now := c.look(context.Background())
	var masters []*Server
	for _, node := range c.nodes {
		if slices.Contains(now.owner[:], c.names[node]) {
			masters = append(masters, node)
		}
	}
	return masters
}

// MasterOf returns the node that owns the slot now, nil if none does or the slot
// is outside 0 to 16383. See Masters for killed and paused nodes.
func (c *Cluster) MasterOf(slot int) *Server {
	if slot < 0 || slot >= Slots {
		return nil
	}
	return c.ids[c.look(context.Background()).owner[slot]]
}

// ReplicasOf returns the replicas of a master, killed ones too, in the order of
// Nodes.
func (c *Cluster) ReplicasOf(master *Server) []*Server {
	now := c.look(context.Background())
	var replicas []*Server
	for _, node := range c.nodes {
		if id := now.masterOf[c.names[node]]; id != "" && c.ids[id] == master {
			replicas = append(replicas, node)
		}
	}
	return replicas
}

// ReplicaOf returns the first replica of a master that runs, nil without any.
func (c *Cluster) ReplicaOf(master *Server) *Server {
	for _, replica := range c.ReplicasOf(master) {
		if replica.Running() {
			return replica
		}
	}
	return nil
}
