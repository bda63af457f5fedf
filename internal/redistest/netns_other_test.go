//go:build !linux

package redistest

func orphanNetns(string) {}
