package main

import (
	"context"
	"crypto/sha1" // Redis names scripts by their SHA-1.
	"encoding/hex"
	"fmt"
	"math"
	"time"

	"github.com/go-redis/redis_rate/v10"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
	"github.com/throttled/throttled/v2"
	goredisstore "github.com/throttled/throttled/v2/store/goredisstore.v9"
	ulule "github.com/ulule/limiter/v3"
	ululestore "github.com/ulule/limiter/v3/drivers/store/redis"
)

// dial makes the client of the systems on go-redis, with its own defaults: 10
// connections for each of GOMAXPROCS. Only the announcements of managed services are off,
// which a plain server does not know.
func dial(at place) redis.UniversalClient {
	quiet := &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	if at.cluster {
		return redis.NewClusterClient(&redis.ClusterOptions{Addrs: at.addrs, MaintNotificationsConfig: quiet})
	}
	return redis.NewClient(&redis.Options{Addr: at.addrs[0], MaintNotificationsConfig: quiet})
}

func answerOf(ok bool) answer {
	if ok {
		return allowed
	}
	return denied
}

// rateOf says a limit as redis_rate does.
func rateOf(l limit) redis_rate.Limit {
	return redis_rate.Limit{Rate: int(l.rate), Burst: int(l.burst), Period: l.per}
}

func openRedisRate(_ context.Context, at place, l limit) (*instance, error) {
	client := dial(at)
	return redisRate(redis_rate.NewLimiter(client), l, func() { _ = client.Close() }), nil
}

func openRedisRateAutoPipe(_ context.Context, at place, l limit) (*instance, error) {
	client := dial(at)
	var pipe *redis.AutoPipeliner
	var err error
	switch c := client.(type) {
	case *redis.Client:
		pipe, err = c.AutoPipeline()
	case *redis.ClusterClient:
		pipe, err = c.AutoPipeline()
	}
	if err != nil {
		_ = client.Close()
		return nil, err
	}
	return redisRate(redis_rate.NewLimiter(pipe), l, func() {
		_ = pipe.Close()
		_ = client.Close()
	}), nil
}

func redisRate(limiter *redis_rate.Limiter, l limit, closing func()) *instance {
	rate := rateOf(l)
	return &instance{
		allow: func(ctx context.Context, key string) (answer, error) {
			r, err := limiter.Allow(ctx, key, rate)
			if err != nil {
				return denied, err
			}
			return answerOf(r.Allowed > 0), nil
		},
		close: closing,
	}
}

func openUlule(_ context.Context, at place, l limit) (*instance, error) {
	client := dial(at)
	store, err := ululestore.NewStore(client)
	if err != nil {
		_ = client.Close()
		return nil, err
	}
	limiter := ulule.New(store, ulule.Rate{Period: l.per, Limit: l.burst})
	return &instance{
		allow: func(ctx context.Context, key string) (answer, error) {
			r, err := limiter.Get(ctx, key)
			if err != nil {
				return denied, err
			}
			return answerOf(!r.Reached), nil
		},
		close: func() { _ = client.Close() },
	}, nil
}

func openThrottled(_ context.Context, at place, l limit) (*instance, error) {
	client := dial(at)
	closing := func() { _ = client.Close() }
	store, err := goredisstore.NewCtx(client, "throttled:")
	if err != nil {
		closing()
		return nil, err
	}
	limiter, err := throttled.NewGCRARateLimiterCtx(store, throttled.RateQuota{
		MaxRate: throttled.PerDuration(int(l.rate), l.per), MaxBurst: int(l.burst - 1),
	})
	if err != nil {
		closing()
		return nil, err
	}
	return &instance{
		allow: func(ctx context.Context, key string) (answer, error) {
			limited, _, err := limiter.RateLimitCtx(ctx, key, 1)
			return answerOf(!limited), err
		},
		close: closing,
	}, nil
}

// plainScript is the token bucket that tutorials show: floating point, on a HASH. It
// forgets nothing and proves nothing; it is the price of a round trip with a script that
// reads and writes one HASH.
const plainScript = `
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local state = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens, at = tonumber(state[1] or burst), tonumber(state[2] or now)
tokens = math.min(burst, tokens + math.max(0, now - at) * rate)
local allowed = tokens >= 1
if allowed then tokens = tokens - 1 end
redis.call('HSET', KEYS[1], 'tokens', string.format('%.17g', tokens), 'at', string.format('%.17g', now))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return { allowed and 1 or 0, math.floor(tokens) }`

func openPlain(ctx context.Context, at place, l limit) (*instance, error) {
	client := dial(at)
	sum := sha1.Sum([]byte(plainScript))
	sha := hex.EncodeToString(sum[:])
	if err := client.ScriptLoad(ctx, plainScript).Err(); err != nil {
		_ = client.Close()
		return nil, fmt.Errorf("loading the script: %w", err)
	}
	perSecond := float64(l.rate) / l.per.Seconds()
	fill := math.Ceil(float64(l.burst)/perSecond*1000) + float64(time.Second.Milliseconds())
	rate, burst, ttl := fmt.Sprintf("%.17g", perSecond), fmt.Sprint(l.burst), fmt.Sprintf("%.0f", fill)
	return &instance{
		allow: func(ctx context.Context, key string) (answer, error) {
			reply, err := client.EvalSha(ctx, sha, []string{key}, rate, burst, ttl).Int64Slice()
			if err != nil {
				return denied, err
			}
			return answerOf(reply[0] == 1), nil
		},
		close: func() { _ = client.Close() },
	}, nil
}
