package ringfence

import (
	"github.com/redis/go-redis/v9"
)

// newSentinelNodes are a Sentinel set's master and its replicas, whoever they are by now:
// go-redis asks the sentinels and follows their announcements. The sentinels promote;
// ringfence only follows.
func newSentinelNodes(t *target, c nodeConfig) []node {
	o := redis.FailoverOptions{
		MasterName: t.master, SentinelAddrs: t.addrs,
		Username: t.username, Password: t.password, DB: t.db, TLSConfig: t.secured(c.tls),
		MaxRetries: -1, DialerRetries: 1,
		DialTimeout: c.timeout, ReadTimeout: c.timeout, WriteTimeout: c.timeout, PoolTimeout: c.timeout,
		ContextTimeoutEnabled: true, PoolSize: c.poolSize, DisableIdentity: true,
	}
	o.Dialer = dialerOf(c.dialer, o.TLSConfig, c.timeout, c.gate, false)
	replicas := o
	replicas.ReplicaOnly = true
	primary := newClientNode(redis.NewFailoverClient(&o), c, false)
	looks := newClientNode(redis.NewFailoverClient(&replicas), c, false)
	primary.where, looks.where = "sentinel "+t.master, "replicas of sentinel "+t.master
	primary.owned, looks.owned = true, true
	return []node{primary, looks}
}
