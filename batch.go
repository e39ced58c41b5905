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

// A batch has at most maxBatch calls. After maxWait it starts beside a slow one.
const maxBatch, maxWait = 100, time.Millisecond

// A batcher makes calls of type C, whose results have type R.
//
// A call that finds no batch running starts at once. No call waits longer than
// maxWait for another batch, so a batch on a dead connection delays no other. A
// caller returns when its own context ends. The context of a batch ends when all of
// its callers have gone; it has the latest of their deadlines, and the values of the
// first one's context.
type batcher[C, R any] struct {
	// run makes all calls, and returns their results in the same order.
	run func(context.Context, []C) ([]R, error)
	// mayRepeat reports whether a batch that failed with this error had no
	// effect, and some of its calls may succeed. It is then run again in halves,
	// so that one bad call fails alone.
	mayRepeat func(error) bool

	turn chan struct{} // holds one token, which a running batch has taken
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
	calls    []C
	waiting  int           // callers that have not gone
	done     chan struct{} // closed when results and errs are there
	results  []R
	errs     []error
}

// do makes a call and returns its result, or the error of ctx if ctx ends first.
// When all callers have gone, the batch is cancelled.
func (b *batcher[C, R]) do(ctx context.Context, call C) (result R, err error) {
	joined, i := b.join(ctx, call)
	select {
	case <-joined.done:
		return joined.results[i], joined.errs[i]
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if joined.waiting--; joined.waiting == 0 {
		joined.cancel()
	}
	return result, ctx.Err()
}

// join adds a call to the next batch, and returns its index there.
func (b *batcher[C, R]) join(ctx context.Context, call C) (joined *batch[C, R], i int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == nil || len(b.next.calls) == maxBatch || b.next.ctx.Err() != nil {
		b.next = &batch[C, R]{done: make(chan struct{})}
		b.next.ctx, b.next.cancel = context.WithCancel(context.WithoutCancel(ctx))
		go b.start(b.next)
	}
	joined = b.next
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().AddDate(1, 0, 0) // as good as none
	}
	if deadline.After(joined.deadline) {
		joined.deadline = deadline
	}
	joined.calls = append(joined.calls, call)
	joined.waiting++
	return joined, len(joined.calls) - 1
}

// start runs a batch when its turn has come, or after maxWait.
func (b *batcher[C, R]) start(own *batch[C, R]) {
	select {
	case <-b.turn:
		defer func() { b.turn <- struct{}{} }()
	case <-time.After(maxWait):
	}
	b.mu.Lock()
	if b.next == own { // no call joins any more
		b.next = nil
	}
	b.mu.Unlock()
	defer own.cancel()
	ctx, cancel := context.WithDeadline(own.ctx, own.deadline)
	defer cancel()
	own.results, own.errs = make([]R, len(own.calls)), make([]error, len(own.calls))
	b.runAll(ctx, own.calls, own.results, own.errs)
	close(own.done)
}

// runAll runs calls and sets their results and errors.
func (b *batcher[C, R]) runAll(ctx context.Context, calls []C, results []R, errs []error) {
	all, err := b.runOnce(ctx, calls)
	if half := len(calls) / 2; err != nil && half > 0 && b.mayRepeat(err) {
		b.runAll(ctx, calls[:half], results[:half], errs[:half])
		b.runAll(ctx, calls[half:], results[half:], errs[half:])
		return
	}
	copy(results, all)
	for i := range errs {
		errs[i] = err
	}
}

// runOnce makes a panic an error: this goroutine is no caller's, and nothing
// else would recover it.
func (b *batcher[C, R]) runOnce(ctx context.Context, calls []C) (results []R, err error) {
	defer recoverTo(&err)
	return b.run(ctx, calls)
}

// recoverTo makes a panic of the function that defers it an error.
func recoverTo(err *error) {
	if v := recover(); v != nil {
		*err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
	}
}
