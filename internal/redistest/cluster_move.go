package redistest

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// keysPerStep is how many keys MoveSlot carries at a time. While a step runs
// the source answers nobody, so it is small.
const keysPerStep = 20

// MoveSlot moves a slot with its keys to another master, in the order that
// loses nothing while clients write: both sides know of the move before the
// first key moves (clients are sent after keys with ASK), and the new owner
// knows that it is one before the old owner lets go. It returns once all running
// nodes agree. It waits 30 s if ctx has no deadline.
//
// After an error the slot may be half moved, and is served all the same: the
// same call again goes on with it. Nodes that want credentials are beyond it.
func (c *Cluster) MoveSlot(ctx context.Context, slot int, to *Server) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	if err := c.moveSlot(ctx, slot, to); err != nil {
		return fmt.Errorf("redistest: moving slot %d to %s: %w", slot, to.Addr(), err)
	}
	return nil
}

func (c *Cluster) moveSlot(ctx context.Context, slot int, to *Server) error {
	if slot < 0 || slot >= Slots {
		return fmt.Errorf("slots are 0 to %d", Slots-1)
	}
	now := c.look(ctx)
	target := c.names[to]
	switch {
	case target == "":
		return errors.New("that server is no node of this cluster")
	case now.masterOf[target] != "":
		return errors.New("that node is a replica; slots belong to masters")
	}
	source := now.owner[slot]
	from := c.ids[source]
	switch {
	case from == nil:
		return errors.New("nobody owns it")
	case from == to:
		return nil
	}

	if err := to.cluster(ctx, "SETSLOT", slot, "IMPORTING", source); err != nil {
		return err
	}
	if err := from.cluster(ctx, "SETSLOT", slot, "MIGRATING", target); err != nil {
		return err
	}
	for moved := -1; moved != 0; {
		var err error
		if moved, err = from.moveKeys(ctx, slot, to); err != nil {
			return err
		}
	}
	owners := []*Server{to, from}
	for _, node := range c.nodes {
		if node != to && node != from && node.Running() && now.masterOf[c.names[node]] == "" {
			owners = append(owners, node)
		}
	}
	for _, node := range owners {
		if err := node.cluster(ctx, "SETSLOT", slot, "NODE", target); err != nil {
			return err
		}
	}
	return c.agreeOn(ctx, slot, target, owners)
}

// moveKeys carries one step's keys and returns how many those were.
func (s *Server) moveKeys(ctx context.Context, slot int, to *Server) (int, error) {
	keys, err := s.Client().ClusterGetKeysInSlot(ctx, slot, keysPerStep).Result()
	if err != nil {
		return 0, fmt.Errorf("listing its keys on %s: %w", s.Addr(), err)
	}
	if len(keys) == 0 {
		return 0, nil
	}
	const timeoutMillis = 2000
	args := []any{"MIGRATE", to.host().String(), to.port, "", 0, timeoutMillis, "KEYS"}
	for _, key := range keys {
		args = append(args, key)
	}
	// NOKEY, when all of them have expired meanwhile, is no error.
	if err := s.Client().Do(ctx, args...).Err(); err != nil {
		return 0, fmt.Errorf("moving %d keys from %s: %w", len(keys), s.Addr(), err)
	}
	return len(keys), nil
}

// agreeOn waits until every running node, replicas too, names the owner and knows the epoch
// with which it claims the slot. A node that knows an older one of it believes the next
// belated word of the owner before; and the master that gets the slot next, which chooses
// the highest epoch that it knows of and one more, may choose one that is taken. A master
// that has changed its mind is told again: nothing else might change it back.
func (c *Cluster) agreeOn(ctx context.Context, slot int, owner string, masters []*Server) error {
	var claimed int64
	err := poll(ctx, func() (bool, error) {
		v, err := c.ids[owner].view(ctx)
		claimed = v[owner].epoch
		return v[owner].self, err
	})
	for _, node := range c.nodes {
		if err != nil {
			break
		}
		err = poll(ctx, func() (bool, error) {
			if !node.Running() {
				return true, nil
			}
			v, err := node.view(ctx)
			if err != nil {
				return false, err
			}
			if c.merge([]view{v}).owner[slot] == owner {
				return v[owner].epoch >= claimed, nil
			}
			if slices.Contains(masters, node) {
				err = node.cluster(ctx, "SETSLOT", slot, "NODE", owner)
			}
			return false, err
		})
		if err != nil {
			err = fmt.Errorf("%s does not know yet: %w", node.Addr(), err)
		}
	}
	return err
}
