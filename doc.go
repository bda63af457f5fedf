// Package ringfence limits how often something may happen, across every
// process that shares a set of Redis servers.
package ringfence
