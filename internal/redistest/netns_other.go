//go:build !linux

package redistest

// wires exist on Linux only: elsewhere open refuses and no method is ever
// called.
type wires struct{}

func (n *Netns) open() error { return ErrNoPrivilege }

func (n *Netns) spawner() spawner          { return &forkThread }
func (n *Netns) inside(func() error) error { return ErrNoPrivilege }
func (*wires) toServer([]byte)             {}
func (*wires) toClient([]byte)             {}
func (*wires) readServer(func([]byte))     {}
func (*wires) readClient(func([]byte))     {}
func (*wires) close()                      {}
