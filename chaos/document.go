package main

import (
	"context"
	"errors"
)

func writeDocument(ctx context.Context, results, file string) error {
	_ = ctx
	_ = results
	_ = file
	return errors.New("TODO")
}
