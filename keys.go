package ringfence

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"unsafe"

	"github.com/dchest/siphash"
)

// The stored format: keys, and which of them share a slot. Everything that another
// release or another process must agree on about key names is in this file.
//
//	<prefix>:<storage version>:{<22 characters>}
//
// The 22 characters are base64url of a keyed 128-bit hash of (algorithm, limiter,
// key). Nothing of the caller's key is left in it, so a key chosen by an attacker can
// neither pick a shard or a slot of a Redis Cluster nor break out of the braces; and
// every key is 22 bytes long there, however long it was. The braces make the hash alone
// the part that a Cluster hashes: changing the prefix moves nothing. The upper half of
// the same hash picks the shard.
const (
	// storageVersion names the stored format. A release reads its own version and
	// the one before; see scripts/README.md for the rule of upgrades.
	storageVersion = "1"
	defaultPrefix  = "rf"
	keyHashChars   = 22
)

// publishedHashKey is used when Config.HashKey is not set. It spreads keys just as
// well, but anybody can compute where a key lands.
var publishedHashKey = [16]byte([]byte("ringfence/public"))

// keyHash is the keyed hash of (algorithm, limiter, key).
type keyHash struct{ hi, lo uint64 }

// keyer hashes the keys of one limiter.
type keyer struct{ k0, k1 uint64 }

// newKeyer derives a limiter's own key from the deployment's, so that hashing a
// caller's key later is one pass over it: SipHash-2-4-128 (Aumasson and Bernstein
// 2012) of the algorithm and the limiter's name.
func newKeyer(hashKey [16]byte, algorithm, limiter string) keyer {
	k0 := binary.LittleEndian.Uint64(hashKey[:8])
	k1 := binary.LittleEndian.Uint64(hashKey[8:])
	// The zero byte cannot be in either, so the pair is unambiguous.
	k0, k1 = siphash.Hash128(k0, k1, []byte(algorithm+"\x00"+limiter))
	return keyer{k0, k1}
}

// hash allocates nothing: it reads the string where it is.
func (k keyer) hash(key string) keyHash {
	hi, lo := siphash.Hash128(k.k0, k.k1, unsafe.Slice(unsafe.StringData(key), len(key)))
	return keyHash{hi, lo}
}

// keySpace writes the names of one ring's keys.
type keySpace struct{ head string }

func newKeySpace(prefix string) keySpace {
	return keySpace{head: prefix + ":" + storageVersion + ":{"}
}

// append appends the name of the key with this hash to b.
func (s keySpace) append(b []byte, h keyHash) []byte {
	var raw [16]byte
	binary.BigEndian.PutUint64(raw[:8], h.hi)
	binary.BigEndian.PutUint64(raw[8:], h.lo)
	b = append(b, s.head...)
	b = base64.RawURLEncoding.AppendEncode(b, raw[:])
	return append(b, '}')
}

// tagged appends the name of the key with this text between the braces to b.
func (s keySpace) tagged(b []byte, tag string) []byte {
	return append(append(append(b, s.head...), tag...), '}')
}

// tagOf is what a Redis Cluster hashes of a name.
func tagOf(name []byte) []byte { return name[bytes.IndexByte(name, '{')+1 : len(name)-1] }

// fingerprint is the name of the key under which a shard keeps the fingerprint of the
// configuration that its users share.
func (s keySpace) fingerprint() string { return s.head + "fingerprint}" }

// instances is the name of the key under which a shard keeps the heartbeats.
func (s keySpace) instances() string { return s.head + "instances}" }
