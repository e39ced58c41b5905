package main

// batch.go runs calls together. Calls that arrive while a batch is running share
// the next one: one statement, one round trip, one commit for all of them. It
// knows neither tasks nor SQL.

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"
)

const (
	maxBatch = 100              // calls
	maxWait  = time.Millisecond // before a batch starts beside a slow one
)

// A batcher makes calls of type C, whose results have type R.
//
// A call that finds no batch running starts at once. No call waits longer than
// maxWait, so a batch on a dead connection delays no other. A caller stays no
// longer than its own context. The context of a batch ends when all of its
// callers have gone, and has the latest of their deadlines.
type batcher[C, R any] struct {
	// run makes all calls, and returns their results in the same order.
	run func(context.Context, []C) ([]R, error)
	// mayRepeat reports whether a batch that failed with this error had no
	// effect and would not fail for each call alone. It is then run again in
	// halves, so that one bad call fails alone.
	mayRepeat func(error) bool

	turn chan struct{} // has an element unless a batch that took it is running
	mu   sync.Mutex
	next *batch[C, R] // what calls join; nil: the next call begins a batch
}

func newBatcher[C, R any](run func(context.Context, []C) ([]R, error), mayRepeat func(error) bool) *batcher[C, R] {
	b := &batcher[C, R]{run: run, mayRepeat: mayRepeat, turn: make(chan struct{}, 1)}
	b.turn <- struct{}{}
	return b
}

// batch is the calls that run together.
type batch[C, R any] struct {
	ctx      context.Context
	cancel   context.CancelFunc
	deadline time.Time // the latest of the callers'
	endless  bool      // a caller has no deadline
	calls    []C
	waiting  int           // callers that have not gone
	full     chan struct{} // closed when no more calls may join
	done     chan struct{} // closed when outcomes are there
	outcomes []outcome[R]
}

type outcome[R any] struct {
	result R
	err    error
}

// do makes a call. Its error is that of ctx if ctx ends first.
func (b *batcher[C, R]) do(ctx context.Context, call C) (R, error) {
	own, i := b.join(ctx, call)
	select {
	case <-own.done:
		return own.outcomes[i].result, own.outcomes[i].err
	case <-ctx.Done():
		b.abandon(own)
		var none R
		return none, ctx.Err()
	}
}

// join adds a call to the next batch, and returns its index there.
func (b *batcher[C, R]) join(ctx context.Context, call C) (own *batch[C, R], i int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == nil {
		b.next = &batch[C, R]{full: make(chan struct{}), done: make(chan struct{})}
		b.next.ctx, b.next.cancel = context.WithCancel(context.WithoutCancel(ctx))
		go b.lead(b.next)
	}
	own = b.next
	deadline, ok := ctx.Deadline()
	own.endless = own.endless || !ok
	if deadline.After(own.deadline) {
		own.deadline = deadline
	}
	own.calls = append(own.calls, call)
	own.waiting++
	if len(own.calls) == maxBatch {
		b.next = nil
		close(own.full)
	}
	return own, len(own.calls) - 1
}

// abandon ends a batch if the last of its callers has gone.
func (b *batcher[C, R]) abandon(own *batch[C, R]) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if own.waiting--; own.waiting > 0 {
		return
	}
	own.cancel()
	if b.next == own {
		b.next = nil
	}
}

// lead runs a batch when its turn has come, when it is full, or after maxWait.
func (b *batcher[C, R]) lead(own *batch[C, R]) {
	select {
	case <-b.turn:
		defer func() { b.turn <- struct{}{} }()
	case <-own.full:
	case <-time.After(maxWait):
	}
	b.mu.Lock()
	if b.next == own {
		b.next = nil
	}
	b.mu.Unlock()
	defer own.cancel()
	ctx := own.ctx
	if !own.endless {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, own.deadline)
		defer cancel()
	}
	own.outcomes = make([]outcome[R], len(own.calls))
	b.runAll(ctx, own.calls, own.outcomes)
	close(own.done)
}

// runAll runs calls and sets their outcomes.
func (b *batcher[C, R]) runAll(ctx context.Context, calls []C, outcomes []outcome[R]) {
	results, err := b.runOnce(ctx, calls)
	if err != nil && len(calls) > 1 && b.mayRepeat(err) {
		half := len(calls) / 2
		b.runAll(ctx, calls[:half], outcomes[:half])
		b.runAll(ctx, calls[half:], outcomes[half:])
		return
	}
	for i := range outcomes {
		if outcomes[i].err = err; err == nil {
			outcomes[i].result = results[i]
		}
	}
}

// runOnce makes a panic an error: this goroutine is no caller's, and nothing
// else would recover it.
func (b *batcher[C, R]) runOnce(ctx context.Context, calls []C) (results []R, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	return b.run(ctx, calls)
}
