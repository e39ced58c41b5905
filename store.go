package main

// store.go keeps tasks in PostgreSQL: the SQL, and nothing of HTTP. An operation
// is one statement, so PostgreSQL applies it whole or not at all, and
// [OpenDB]'s connections see to it that none which writes is run twice. Fetches
// that come together share one, and so do creations.

import (
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

//go:embed schema.sql
var schema string

// Store keeps tasks. Its methods may be called from many goroutines. Their
// errors are those of task.go, [ErrUnavailable] among them when the database did
// not answer as it should: then a write may or may not have been applied, once.
// Any other error is a defect.
type Store struct {
	db        *sql.DB
	turns     chan struct{} // one for each connection that db may open
	creations gatherer[Task]
	fetches   gatherer[string]
	last      atomic.Int64 // the latest time of creation given out, in microseconds
}

// NewStore returns a Store on a pool of [OpenDB], whose limit of open
// connections must not change afterwards.
func NewStore(db *sql.DB) *Store {
	s := &Store{db: db, turns: make(chan struct{}, cmp.Or(db.Stats().MaxOpenConnections, math.MaxInt32))}
	s.creations.run = s.createAll
	s.fetches.run = s.fetchAll
	return s
}

// Migrate applies schema.sql, or says what the service needs and does not find.
// Any number of starts may run it at once, and a complete schema is left as it
// is. An [ErrUnavailable] may pass: a table may also be locked for the moment.
func (s *Store) Migrate(ctx context.Context) error {
	// A start that has waited for another one must see what that has committed.
	_, err := s.db.ExecContext(ctx, "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; "+schema)
	if err != nil {
		return fmt.Errorf("apply the schema: %w", unavailable(ctx, err))
	}
	return nil
}

// findSchema returns the quoted name of the schema that db's own search_path
// finds first. Behind a pooler, another client may have left a different
// search_path in the session, so it is reset, for this statement alone.
func findSchema(ctx context.Context, db *sql.DB) (string, error) {
	var name *string
	err := db.QueryRowContext(ctx, `
	SELECT quote_ident(current_schema())
	FROM (SELECT set_config('search_path', reset_val, true) AS path FROM pg_settings WHERE name = 'search_path') AS reset
	WHERE path IS NOT NULL`).Scan(&name)
	if err != nil {
		return "", fmt.Errorf("find the schema: %w", unavailable(ctx, err))
	}
	if name == nil {
		return "", errors.New("find the schema: search_path names none that exists")
	}
	return *name, nil
}

// Ping asks the database for a sign of life.
func (s *Store) Ping(ctx context.Context) error {
	return unavailable(ctx, s.db.PingContext(ctx))
}

// Stats returns the statistics of the pool.
func (s *Store) Stats() sql.DBStats { return s.db.Stats() }

// columns are those of a task, in the order in which [Store.query] scans them.
const columns = `id, user_id, title, description, completed, version, created_at, updated_at`

const selectTasks = `SELECT ` + columns + ` FROM tasks`

// insertTasks inserts the tasks of a JSON array, with the same key and digest.
const insertTasks = `
	INSERT INTO tasks (` + columns + `, idempotency_key, idempotency_digest)
	SELECT ` + columns + `, $2, $3 FROM json_populate_recordset(NULL::tasks, $1)`

// onRepeat makes an insert whose idempotency key is taken return the task that
// has it, unless another content was asked for. The update changes nothing; it
// is what lets the statement return a row that another one, perhaps still under
// way, has inserted.
const onRepeat = `
	ON CONFLICT (coalesce(user_id, ''), idempotency_key) WHERE idempotency_key IS NOT NULL
	DO UPDATE SET idempotency_key = excluded.idempotency_key
	WHERE tasks.idempotency_digest = excluded.idempotency_digest`

const returning = ` RETURNING ` + columns

// target selects the task of a [Target], whose fields are the first parameters.
const target = `
	WHERE id = $1 AND ($2::text IS NULL OR user_id = $2) AND ($3::bigint[] IS NULL OR version = ANY ($3))`

// step is what each change does besides. A transaction that began earlier may
// end later, hence greatest.
const step = `version = version + 1, updated_at = greatest(updated_at, now())`

// Create makes a task. With a key that the owner has used before it returns the
// task made then, as it now is, and true; if that was to have another content,
// [ErrKeyReused].
func (s *Store) Create(ctx context.Context, n NewTask, key string) (t Task, replayed bool, err error) {
	now := s.now()
	t = Task{newID(now), n.UserID, n.Title, n.Description, n.Completed, 1, now, now}
	if key == "" {
		tasks, err := s.creations.do(ctx, t)
		made, err := pick(tasks, t.ID, err)
		return made, false, err
	}
	made, err := s.one(ctx, insertTasks+onRepeat+returning, string(appendTasks(nil, []Task{t})), key, digest(n))
	if errors.Is(err, ErrNotFound) {
		err = ErrKeyReused
	}
	return made, made.ID != t.ID, err
}

// createAll makes several tasks: all of them, or else, if the database refuses
// one, those that it does not refuse.
func (s *Store) createAll(ctx context.Context, tasks []Task) ([]Task, error) {
	made, err := s.query(ctx, insertTasks+returning, string(appendTasks(nil, tasks)), nil, nil)
	if len(tasks) == 1 || err == nil || errors.Is(err, ErrUnavailable) {
		return made, err
	}
	for _, t := range tasks {
		one, oneErr := s.createAll(ctx, []Task{t})
		made, err = append(made, one...), errors.Join(err, oneErr)
	}
	return made, err
}

// pick returns the task with an id from those of a batch. It may be there in
// spite of an error, which is then another one's.
func pick(tasks []Task, id string, err error) (Task, error) {
	i := slices.IndexFunc(tasks, func(t Task) bool { return t.ID == id })
	if i < 0 {
		return Task{}, cmp.Or(err, ErrNotFound)
	}
	return tasks[i], nil
}

// now returns the time in microseconds, which is what PostgreSQL keeps, and
// never the same twice, so that tasks of one Store sort as they were created.
func (s *Store) now() time.Time {
	for {
		last := s.last.Load()
		now := max(time.Now().UnixMicro(), last+1)
		if s.last.CompareAndSwap(last, now) {
			return time.UnixMicro(now).UTC()
		}
	}
}

// digest identifies the content of a new task.
func digest(n NewTask) []byte {
	text, _ := json.Marshal(n) // cannot fail: strings and a bool
	sum := sha256.Sum256(text)
	return sum[:]
}

// List returns a page of tasks and reports whether more follow.
//
// A page is one range of the index whose columns are what is filtered by, and
// id. It is put so that PostgreSQL reads nothing else. With = for a filter it
// would expect tasks that match to be spread evenly, and might walk another index
// past millions that do not; = ANY asks for the same, but leaves one index only
// that has the order asked for. That works for an index's first column. For the
// second there is a row comparison, of which PostgreSQL looks at the first value:
// where few tasks come behind all of this user's, it would take the range for
// short, and read and sort all of it. Hence the subquery, into which it does not
// look.
func (s *Store) List(ctx context.Context, f Filter) (page []Task, more bool, err error) {
	beyond, until, order, start := ">", "<=", "", "00000000-0000-0000-0000-000000000000"
	if f.Descending {
		beyond, until, order, start = "<", ">=", " DESC", "ffffffff-ffff-ffff-ffff-ffffffffffff"
	}
	where, by, args := "id "+beyond+" $2", "", []any{f.Limit + 1, cmp.Or(f.After, start)}
	if f.Owner != nil {
		where, by, args = "user_id = ANY (ARRAY[$3]) AND "+where, "user_id"+order+", ", append(args, *f.Owner)
	}
	if f.Owner != nil && f.Completed != nil {
		where = "user_id " + until + " $3 AND (user_id, id) " + beyond + " ((SELECT $3::text), $2)"
	}
	if f.Completed != nil {
		where = "completed = ANY (ARRAY[" + strconv.FormatBool(*f.Completed) + "]) AND " + where
		by = "completed" + order + ", " + by
	}
	query := selectTasks + " WHERE " + where + " ORDER BY " + by + "id" + order + " LIMIT $1"
	page, err = s.query(ctx, query, args...)
	if len(page) > f.Limit {
		return page[:f.Limit], true, err
	}
	return page, false, err
}

// Get returns a task, whatever its version.
func (s *Store) Get(ctx context.Context, t Target) (Task, error) {
	tasks, err := s.fetches.do(ctx, t.ID)
	task, err := pick(tasks, t.ID, err)
	if err == nil && t.Owner != nil && (task.UserID == nil || *task.UserID != *t.Owner) {
		return Task{}, ErrNotFound
	}
	return task, err
}

// fetchAll returns the tasks with the given ids, as far as there are any.
func (s *Store) fetchAll(ctx context.Context, ids []string) ([]Task, error) {
	return s.query(ctx, selectTasks+" WHERE id = ANY ($1)", ids)
}

// Patch changes the members that the patch has. A patch without any changes nothing.
func (s *Store) Patch(ctx context.Context, t Target, p Patch) (Task, error) {
	if p == (Patch{}) {
		return s.change(ctx, t, selectTasks+target)
	}
	return s.change(ctx, t, `
	UPDATE tasks SET title = coalesce($4, title), description = CASE WHEN $5 THEN $6 ELSE description END,
		completed = coalesce($7, completed), `+step+target+returning,
		p.Title, p.Description.Set, p.Description.Value, p.Completed)
}

// Flip turns whether a task is completed into the opposite.
func (s *Store) Flip(ctx context.Context, t Target) (Task, error) {
	return s.change(ctx, t, `UPDATE tasks SET completed = NOT completed, `+step+target+returning)
}

// Delete deletes a task.
func (s *Store) Delete(ctx context.Context, t Target) error {
	_, err := s.change(ctx, t, `DELETE FROM tasks`+target+returning)
	return err
}

// change runs a statement on a target, whose fields are its first parameters.
// When there was none, it tells a task that is not there from one that has
// another version.
func (s *Store) change(ctx context.Context, t Target, query string, args ...any) (Task, error) {
	task, err := s.one(ctx, query, append([]any{t.ID, t.Owner, t.Versions}, args...)...)
	if errors.Is(err, ErrNotFound) && t.Versions != nil {
		if _, err := s.Get(ctx, Target{ID: t.ID, Owner: t.Owner}); err != nil {
			return Task{}, err
		}
		return Task{}, ErrVersion
	}
	return task, err
}

// one runs a statement that returns one task. [ErrNotFound]: it returned none.
func (s *Store) one(ctx context.Context, statement string, args ...any) (Task, error) {
	tasks, err := s.query(ctx, statement, args...)
	if err != nil {
		return Task{}, err
	}
	if len(tasks) == 0 {
		return Task{}, ErrNotFound
	}
	return tasks[0], nil
}

// query runs a statement that returns tasks. It first waits for a turn on the
// pool: turns come in the order of asking, while database/sql alone serves in no
// order, so that under load some requests would wait until their deadline.
func (s *Store) query(ctx context.Context, statement string, args ...any) (tasks []Task, err error) {
	defer func() { err = unavailable(ctx, err) }()
	select {
	case s.turns <- struct{}{}:
		defer func() { <-s.turns }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	rows, err := s.db.QueryContext(ctx, statement, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	tasks = make([]Task, 0, 16)
	for rows.Next() {
		tasks = append(tasks, Task{})
		t := &tasks[len(tasks)-1]
		if err := rows.Scan(&t.ID, &t.UserID, &t.Title, &t.Description, &t.Completed, &t.Version, &t.CreatedAt, &t.UpdatedAt); err != nil {
			return nil, err
		}
		t.CreatedAt, t.UpdatedAt = t.CreatedAt.UTC(), t.UpdatedAt.UTC()
	}
	// The rows may have come before the end of the transaction did, and
	// database/sql does not report what becomes of a statement whose context
	// ends in between.
	if err := cmp.Or(rows.Err(), ctx.Err()); err != nil {
		return nil, err
	}
	return tasks, nil
}

// unavailable makes an error that the database or the end of ctx is to blame for
// an [ErrUnavailable].
func unavailable(ctx context.Context, err error) error {
	_, unreachable := errors.AsType[*connectError](err)
	if err == nil || ctx.Err() == nil && !unreachable && !transient(err) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// A gatherer makes one statement of the calls that come while another is under
// way: one round trip, one plan and one commit for all of them. A call that
// meets none goes at once, and none waits for longer than gatherTime, so that a
// connection which has died holds up nobody else's calls.
type gatherer[T any] struct {
	run      func(context.Context, []T) ([]Task, error)
	mu       sync.Mutex
	next     *batch[T] // which calls join; nil: the next call begins one
	underWay int
}

const (
	gatherTime    = time.Millisecond
	deadlineSlack = 100 * time.Millisecond // by which a call may lose
	maxBatch      = 100                    // calls
)

// batch is the calls that one statement is for. It ends with the deadline of the
// first, or when all have left.
type batch[T any] struct {
	ctx     context.Context
	cancel  context.CancelFunc
	calls   []T
	waiting int           // calls that have not left
	start   chan struct{} // has an element when the batch need not wait for more
	done    chan struct{} // closed when tasks and err are there
	tasks   []Task
	err     error
}

// do makes a call part of a batch, and returns what came of all of it. Whoever
// came first runs it, and stays for the others.
func (g *gatherer[T]) do(ctx context.Context, call T) ([]Task, error) {
	b, first := g.join(ctx, call)
	defer context.AfterFunc(ctx, func() { g.leave(b) })()
	if first {
		g.lead(b)
	}
	select {
	case <-b.done:
		return b.tasks, b.err
	case <-ctx.Done():
		return nil, unavailable(ctx, ctx.Err())
	}
}

func (g *gatherer[T]) join(ctx context.Context, call T) (b *batch[T], first bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.next == nil || g.next.endsBefore(ctx) {
		g.next, first = newBatch[T](ctx), true
	}
	b = g.next
	b.calls = append(b.calls, call)
	b.waiting++
	full := len(b.calls) == maxBatch
	if full {
		g.next = nil
	}
	if full || g.underWay == 0 {
		b.begin()
	}
	return b, first
}

func newBatch[T any](ctx context.Context) *batch[T] {
	b := &batch[T]{start: make(chan struct{}, 1), done: make(chan struct{})}
	deadline, ok := ctx.Deadline()
	ctx = context.WithoutCancel(ctx)
	if ok {
		b.ctx, b.cancel = context.WithDeadline(ctx, deadline)
	} else {
		b.ctx, b.cancel = context.WithCancel(ctx)
	}
	return b
}

// endsBefore reports whether a call with ctx would lose much of its time in the
// batch.
func (b *batch[T]) endsBefore(ctx context.Context) bool {
	end, limited := b.ctx.Deadline()
	deadline, ok := ctx.Deadline()
	return limited && (!ok || deadline.Sub(end) > deadlineSlack)
}

// begin lets a batch begin, if it has not.
func (b *batch[T]) begin() {
	select {
	case b.start <- struct{}{}:
	default:
	}
}

func (g *gatherer[T]) leave(b *batch[T]) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if b.waiting--; b.waiting > 0 {
		return
	}
	b.cancel()
	if g.next == b {
		g.next = nil
	}
}

// lead runs a batch.
func (g *gatherer[T]) lead(b *batch[T]) {
	select {
	case <-b.start:
	case <-time.After(gatherTime):
	}
	g.mu.Lock()
	if g.next == b {
		g.next = nil
	}
	g.underWay++
	g.mu.Unlock()
	defer func() { // after a panic too
		b.cancel()
		close(b.done)
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.underWay--; g.next != nil {
			g.next.begin()
		}
	}()
	b.err = ErrUnavailable // stands if it panics
	b.tasks, b.err = g.run(b.ctx, b.calls)
}
