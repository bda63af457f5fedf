package ringfence_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"github.com/ringfence/ringfence"
	"github.com/ringfence/ringfence/embedded"
)

// The shards here are embedded ones, so that the example runs anywhere; a service names
// its Redis servers instead.
func Example() {
	ctx := context.Background()
	shards, err := embedded.Start(3)
	if err != nil {
		log.Fatal(err)
	}
	defer shards.Close()
	ring, err := ringfence.Open(ctx, ringfence.Config{
		Shards:  shards.Config(),
		HashKey: []byte("sixteen secret b"),
		Budget:  time.Second,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer ring.Close()

	logins, err := ring.Limiter("logins", ringfence.SlidingLog{Limit: 3, Window: time.Minute})
	if err != nil {
		log.Fatal(err)
	}
	for range 4 {
		d, err := logins.Allow(ctx, "user:42")
		if err != nil {
			log.Fatal(err) // misuse or a canceled context; never "Redis is down"
		}
		fmt.Println(d.Allowed, d.Remaining, d.Source)
	}
	// Output:
	// true 2 primary
	// true 1 primary
	// true 0 primary
	// false 0 primary
}

func ExampleLimiter_AllowMany() {
	ctx := context.Background()
	shards, err := embedded.Start(2)
	if err != nil {
		log.Fatal(err)
	}
	defer shards.Close()
	ring, err := ringfence.Open(ctx, ringfence.Config{
		Shards: shards.Config(), HashKey: []byte("sixteen secret b"), Budget: time.Second,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer ring.Close()
	mail, err := ring.Limiter("mail", ringfence.TokenBucket{Rate: 1, Per: time.Hour, Burst: 5})
	if err != nil {
		log.Fatal(err)
	}
	decisions, err := mail.AllowMany(ctx, []ringfence.Request{
		{Key: "ann", Cost: 4}, {Key: "bob", Cost: 1}, {Key: "ann", Cost: 2},
	})
	if err != nil {
		log.Fatal(err)
	}
	for _, d := range decisions {
		fmt.Println(d.Allowed, d.Remaining)
	}
	// Output:
	// true 1
	// true 4
	// false 1
}

func ExampleTokenBucket_String() {
	fmt.Println(ringfence.TokenBucket{Rate: 100, Per: time.Second, Burst: 200})
	fmt.Println(ringfence.SlidingLog{Limit: 100, Window: time.Minute})
	// Output:
	// token bucket: 100 per 1s, burst 200 (at most 300 in any 1s)
	// sliding log: 100 per 1m0s (at most 100 in any 1m0s)
}

func ExampleTokenBucket_Validate() {
	fmt.Println(ringfence.TokenBucket{Rate: 100, Per: time.Second}.Validate())
	fmt.Println(ringfence.SlidingLog{Limit: 10, Window: time.Microsecond}.Validate())
	// Output:
	// ringfence: TokenBucket.Burst = 0: must be at least 1 (the highest cost of one call)
	// ringfence: SlidingLog.Window = 1µs: must be whole microseconds, from 1ms to 8784h0m0s
}
