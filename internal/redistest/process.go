package redistest

import (
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
)

// process is one run of redis-server.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{} // closed once the process is reaped
	killed atomic.Bool   // we ended it, so its end is no surprise
}

// spawner forks children from a thread that outlives them; see forker. Each
// success of start needs one release, after the child is reaped.
type spawner interface {
	start(cmd *exec.Cmd) error
	release()
}

func startProcess(cmd *exec.Cmd, by spawner) (*process, error) {
	cmd.SysProcAttr = childAttr()
	if err := by.start(cmd); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, exited: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		by.release()
		close(p.exited)
	}()
	return p, nil
}

func (p *process) alive() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// kill ends the process, stopped or not, and waits until it is gone. SIGKILL
// and not SIGTERM: there is nothing to save, and a stopped process would not
// see SIGTERM.
func (p *process) kill() {
	p.killed.Store(true)
	p.signal(os.Kill)
	<-p.exited
}

// signal does nothing once the process is reaped: os.Process knows, so a reused
// process id is never hit.
func (p *process) signal(sig os.Signal) { _ = p.cmd.Process.Signal(sig) }

// forkThread starts all children outside namespaces. The kernel sends a child its parent-death
// signal when the *thread* that forked it ends, and Go ends threads as it
// likes: servers would die at random in the middle of a test. So one goroutine,
// locked to its thread, forks every child and keeps the thread while any child
// lives. It ends with the last child, so that leak checks stay quiet.
var forkThread forker

type forker struct {
	mu       sync.Mutex
	children int            // guarded by mu
	jobs     chan func()    // guarded by mu; closed when no child is left
	running  sync.WaitGroup // the goroutine
}

// start runs cmd.Start on the locked thread.
func (f *forker) start(cmd *exec.Cmd) error {
	f.mu.Lock()
	if f.children == 0 {
		jobs := make(chan func())
		f.jobs = jobs
		f.running.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			for job := range jobs {
				job()
			}
		})
	}
	f.children++
	jobs := f.jobs
	f.mu.Unlock()

	result := make(chan error, 1)
	jobs <- func() { result <- cmd.Start() }
	err := <-result
	if err != nil {
		f.release()
	}
	return err
}

func (f *forker) release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.children--
	if f.children == 0 {
		close(f.jobs)
		f.running.Wait()
	}
}
