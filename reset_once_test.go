package ringfence_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/internal/redistest"
)

// A Reset that is executed again wipes out what was charged in between.
func TestResetIsSentOnceThoughTheClientWouldRepeatIt(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	proxy, err := redistest.NewProxy(server.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.Close()
	client := redis.NewClient(&redis.Options{
		Addr: proxy.Addr(), MaxRetries: 20, MinRetryBackoff: 50 * time.Millisecond, MaxRetryBackoff: 50 * time.Millisecond,
	})
	defer client.Close()
	ring, err := ringfence.Open(t.Context(), ringfence.Config{
		Shards: []ringfence.ShardConfig{{ID: "a", Client: client}}, HashKey: make([]byte, 16), Strict: true,
		Budget: 5 * time.Second, OperationTimeout: 5 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	limiter, err := ring.Limiter("l", ringfence.SlidingLog{Limit: 3, Window: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := limiter.Allow(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	proxy.CutReplies(true)
	healed := make(chan struct{})
	go func() { // or a repetition would not get beyond its handshake
		defer close(healed)
		for proxy.Cuts() == 0 && t.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
		proxy.CutReplies(false)
	}()
	err = limiter.Reset(t.Context(), "k")
	<-healed
	if !errors.Is(err, ringfence.ErrUnavailable) {
		t.Errorf("%v, want ErrUnavailable: nobody knows whether it was done", err)
	}
	stats, err := server.Client().Info(t.Context(), "commandstats").Result()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(stats, "cmdstat_unlink:calls=1,") {
		t.Errorf("UNLINK was not executed exactly once:\n%s", stats)
	}
}
