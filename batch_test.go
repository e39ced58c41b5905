package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// heldBatcher is a batcher whose batches end when the test says so. The result
// of a call is the call.
type heldBatcher struct {
	*batcher[string, string]
	batches chan heldBatch
}

// heldBatch is a batch that runs. It ends with what is sent to end, or with its
// context.
type heldBatch struct {
	ctx   context.Context
	calls []string
	end   chan error
}

var errPoison = errors.New("poison")

func newHeldBatcher() *heldBatcher {
	g := &heldBatcher{batches: make(chan heldBatch)}
	g.batcher = newBatcher(func(ctx context.Context, calls []string) ([]string, error) {
		held := heldBatch{ctx, calls, make(chan error)}
		g.batches <- held
		select {
		case err := <-held.end:
			return calls, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}, func(err error) bool { return err == errPoison })
	return g
}

// call makes a call and returns where its error will be.
func (g *heldBatcher) call(t *testing.T, ctx context.Context, call string) <-chan error {
	result := make(chan error, 1)
	go func() {
		got, err := g.do(ctx, call)
		if err == nil && got != call {
			t.Errorf("the result of %q is %q", call, got)
		}
		result <- err
	}()
	synctest.Wait()
	return result
}

// running returns the next batch, which must have the given calls.
func (g *heldBatcher) running(t *testing.T, calls ...string) heldBatch {
	t.Helper()
	select {
	case held := <-g.batches:
		if !slices.Equal(held.calls, calls) {
			t.Fatalf("a batch of %q, not %q", held.calls, calls)
		}
		return held
	case <-time.After(time.Hour):
		t.Fatalf("no batch of %q", calls)
		return heldBatch{}
	}
}

func TestBatcher(t *testing.T) {
	t.Parallel()
	failure := errors.New("failure")
	for _, tt := range []struct {
		name string
		test func(t *testing.T, g *heldBatcher)
	}{
		{"calls that arrive meanwhile are one batch, which starts when the first ends", func(t *testing.T, g *heldBatcher) {
			a := g.call(t, t.Context(), "a")
			first := g.running(t, "a")
			begin := time.Now()
			b, c := g.call(t, t.Context(), "b"), g.call(t, t.Context(), "c")
			first.end <- nil
			second := g.running(t, "b", "c")
			if waited := time.Since(begin); waited != 0 {
				t.Errorf("waited %v", waited)
			}
			second.end <- failure
			if errA, errB, errC := <-a, <-b, <-c; errA != nil || errB != failure || errC != failure {
				t.Error(errA, errB, errC)
			}
		}},
		{"a batch that hangs delays no other for longer than maxWait", func(t *testing.T, g *heldBatcher) {
			a := g.call(t, t.Context(), "a")
			first := g.running(t, "a")
			begin := time.Now()
			b := g.call(t, t.Context(), "b")
			second := g.running(t, "b")
			if waited := time.Since(begin); waited != maxWait {
				t.Errorf("waited %v", waited)
			}
			second.end <- nil
			first.end <- failure
			if errA, errB := <-a, <-b; errA != failure || errB != nil {
				t.Error(errA, errB)
			}
		}},
		{"a full batch is followed by another", func(t *testing.T, g *heldBatcher) {
			a := g.call(t, t.Context(), "a")
			first := g.running(t, "a")
			for i := range maxBatch {
				g.call(t, t.Context(), fmt.Sprint(i))
			}
			rest := g.call(t, t.Context(), "rest")
			full, next := <-g.batches, <-g.batches // in any order
			if len(full.calls)*len(next.calls) != maxBatch {
				t.Errorf("batches of %d and %d calls", len(full.calls), len(next.calls))
			}
			for _, held := range []heldBatch{first, full, next} {
				held.end <- nil
			}
			if errA, errRest := <-a, <-rest; errA != nil || errRest != nil {
				t.Error(errA, errRest)
			}
		}},
		{"a caller that leaves is free at once and takes nothing from the others", func(t *testing.T, g *heldBatcher) {
			for _, i := range []int{0, 1} { // the first caller, and another
				var ctx [2]context.Context
				var leave [2]context.CancelFunc
				for j := range ctx {
					ctx[j], leave[j] = context.WithCancel(t.Context())
					defer leave[j]()
				}
				g.call(t, t.Context(), "a")
				first := g.running(t, "a")
				calls := []<-chan error{g.call(t, ctx[0], "b"), g.call(t, ctx[1], "c")}
				leave[i]()
				if err := <-calls[i]; err != context.Canceled {
					t.Error(err)
				}
				first.end <- nil
				g.running(t, "b", "c").end <- nil
				if err := <-calls[1-i]; err != nil {
					t.Error(err)
				}
			}
		}},
		{"a batch ends with its last caller", func(t *testing.T, g *heldBatcher) {
			ctx, leave := context.WithCancel(t.Context())
			a := g.call(t, ctx, "a")
			first := g.running(t, "a")
			b := g.call(t, ctx, "b")
			leave()
			<-first.ctx.Done()
			second := g.running(t, "b")
			<-second.ctx.Done()
			if errA, errB := <-a, <-b; errA == nil || errB == nil {
				t.Error(errA, errB)
			}
		}},
		{"a batch has the latest deadline of its callers", func(t *testing.T, g *heldBatcher) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			a := g.call(t, t.Context(), "a")
			first := g.running(t, "a")
			later, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			b, c := g.call(t, ctx, "b"), g.call(t, later, "c")
			first.end <- nil
			second := g.running(t, "b", "c")
			want, _ := later.Deadline()
			if got, ok := second.ctx.Deadline(); !ok || got != want {
				t.Errorf("the deadline is %v, not %v", got, want)
			}
			if deadline, ok := first.ctx.Deadline(); ok && time.Until(deadline) < 24*time.Hour {
				t.Error("a batch whose callers have no deadline ends at", deadline)
			}
			if errB := <-b; errB != context.DeadlineExceeded {
				t.Error(errB)
			}
			second.end <- nil
			if errA, errC := <-a, <-c; errA != nil || errC != nil {
				t.Error(errA, errC)
			}
		}},
		{"a call does not join a batch that all have left", func(t *testing.T, g *heldBatcher) {
			ctx, leave := context.WithCancel(t.Context())
			a := g.call(t, t.Context(), "a")
			first := g.running(t, "a")
			b := g.call(t, ctx, "b")
			leave()
			synctest.Wait()
			c := g.call(t, t.Context(), "c")
			for range 2 {
				if held := <-g.batches; held.calls[0] == "c" {
					held.end <- nil
				}
			}
			first.end <- nil
			if errA, errB, errC := <-a, <-b, <-c; errA != nil || errB != context.Canceled || errC != nil {
				t.Error(errA, errB, errC)
			}
		}},
		{"one bad call fails alone", func(t *testing.T, g *heldBatcher) {
			a := g.call(t, t.Context(), "a")
			first := g.running(t, "a")
			calls := []string{"b", "bad", "d", "e", "f"}
			var results []<-chan error
			for _, call := range calls {
				results = append(results, g.call(t, t.Context(), call))
			}
			go func() {
				for held := range g.batches {
					if slices.Contains(held.calls, "bad") {
						held.end <- errPoison
					} else {
						held.end <- nil
					}
				}
			}()
			first.end <- nil
			for i, result := range results {
				if err := <-result; (err == errPoison) != (calls[i] == "bad") || err != nil && err != errPoison {
					t.Errorf("%s: %v", calls[i], err)
				}
			}
			close(g.batches)
			<-a
		}},
		{"a panic is an error, and leaves no caller waiting", func(t *testing.T, g *heldBatcher) {
			g.run = func(context.Context, []string) ([]string, error) { panic("at the disco") }
			for range 2 {
				if err := <-g.call(t, t.Context(), "a"); err == nil {
					t.Error("no error")
				}
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { tt.test(t, newHeldBatcher()) })
		})
	}
}

// When the contexts of thousands of callers end together, each batch ends too.
func TestBatcherAbandoned(t *testing.T) {
	t.Parallel()
	var running atomic.Int64
	b := newBatcher(func(ctx context.Context, calls []int) ([]int, error) {
		running.Add(1)
		defer running.Add(-1)
		<-ctx.Done()
		return nil, ctx.Err()
	}, func(error) bool { return false })
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(5*time.Millisecond, cancel)
		together(5000, func(i int) { b.do(ctx, i) })
		waitFor(t, "all batches to end", func() bool { return running.Load() == 0 })
	}
}
