package main

import (
	"context"
	"fmt"

	"github.com/redis/rueidis"
)

func openRueidis(_ context.Context, at place, _ limit) (*instance, error) {
	if at.script == nil {
		return nil, fmt.Errorf("rueidis-script needs ringfence's script and there is none")
	}
	client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: at.addrs[:1]})
	if err != nil {
		return nil, err
	}
	script := rueidis.NewLuaScript(at.script.text)
	tail := at.script.single.tail
	return &instance{
		allow: func(ctx context.Context, key string) (answer, error) {
			reply, err := script.Exec(ctx, client, []string{storedKey(key)}, tail).AsIntSlice()
			if err != nil {
				return denied, err
			}
			granted, err := replyGrant(reply, 1, 0)
			return answerOf(granted == 1), err
		},
		close: client.Close,
	}, nil
}
