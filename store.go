package main

// store.go keeps tasks in PostgreSQL: the SQL, and nothing of HTTP. An operation
// is one statement, so PostgreSQL applies it whole or not at all, and
// [OpenDB]'s connections see to it that none which writes is run twice.

import (
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
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
	db    *sql.DB
	turns chan struct{} // one for each connection that db may open
	last  atomic.Int64  // the latest time of creation given out, in microseconds
}

// NewStore returns a Store on a pool of [OpenDB], whose limit of open
// connections must not change afterwards.
func NewStore(db *sql.DB) *Store {
	s := &Store{db: db}
	if n := db.Stats().MaxOpenConnections; n > 0 {
		s.turns = make(chan struct{}, n)
	}
	return s
}

// Migrate applies schema.sql. A role that may not do so is content with a schema
// that stands already.
func (s *Store) Migrate(ctx context.Context) error {
	_, err := s.db.ExecContext(ctx, schema)
	if sqlState(err) == "42501" { // insufficient_privilege
		if _, missing := s.db.ExecContext(ctx, selectTasks+" LIMIT 0"); missing == nil {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("apply the schema: %w", err)
	}
	return nil
}

// Ping asks the database for a sign of life.
func (s *Store) Ping(ctx context.Context) error {
	return unavailable(ctx, s.db.PingContext(ctx))
}

// Stats returns the statistics of the pool.
func (s *Store) Stats() sql.DBStats { return s.db.Stats() }

// columns are those of a task, in the order of [scan].
const columns = `id, user_id, title, description, completed, version, created_at, updated_at`

const selectTasks = `SELECT ` + columns + ` FROM tasks`

const insertTask = `
	INSERT INTO tasks (id, user_id, title, description, completed, created_at, updated_at, idempotency_key, idempotency_digest)
	VALUES ($1, $2, $3, $4, $5, $6, $6, $7, $8)`

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
	id := newID(now)
	if key == "" {
		t, err = s.one(ctx, insertTask+returning,
			id, n.UserID, n.Title, n.Description, n.Completed, now, nil, nil)
		return t, false, err
	}
	t, err = s.one(ctx, insertTask+onRepeat+returning,
		id, n.UserID, n.Title, n.Description, n.Completed, now, key, digest(n))
	if errors.Is(err, ErrNotFound) {
		err = ErrKeyReused
	}
	return t, t.ID != id, err
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
// id. It is put so that PostgreSQL reads nothing else. With = for the filters it
// would expect tasks that match to be spread evenly, and might walk the primary
// key past millions that do not. With a limit that it can see it would read and
// sort all that follows wherever it takes that for little more than a page, and
// of a row comparison it knows the first column only.
func (s *Store) List(ctx context.Context, f Filter) (page []Task, more bool, err error) {
	beyond, until, order, start := ">", "<=", "", "00000000-0000-0000-0000-000000000000"
	if f.Descending {
		beyond, until, order, start = "<", ">=", " DESC", "ffffffff-ffff-ffff-ffff-ffffffffffff"
	}
	var keys, values []string // what is filtered by
	args := []any{f.Limit + 1, cmp.Or(f.After, start)}
	if f.Owner != nil {
		keys, values, args = append(keys, "user_id"), append(values, "$3"), append(args, *f.Owner)
	}
	if f.Completed != nil {
		keys, values = append(keys, "completed"), append(values, strconv.FormatBool(*f.Completed))
	}
	query := selectTasks + " WHERE "
	if len(keys) > 0 {
		query += "(" + strings.Join(keys, ", ") + ") " + until + " (" + strings.Join(values, ", ") + ") AND "
	}
	keys, values = append(keys, "id"), append(values, "$2")
	query += "(" + strings.Join(keys, ", ") + ") " + beyond + " (" + strings.Join(values, ", ") + ")" +
		" ORDER BY " + strings.Join(keys, order+", ") + order + " LIMIT (SELECT $1::bigint)"
	page, err = s.many(ctx, query, args...)
	if len(page) > f.Limit {
		return page[:f.Limit], true, err
	}
	return page, false, err
}

// Get returns a task, whatever its version. Its statement has only the conditions
// that it needs, because it is the one that is planned the most often.
func (s *Store) Get(ctx context.Context, t Target) (Task, error) {
	if t.Owner == nil {
		return s.one(ctx, selectTasks+" WHERE id = $1", t.ID)
	}
	return s.one(ctx, selectTasks+" WHERE id = $1 AND user_id = $2", t.ID, *t.Owner)
}

// Replace replaces what a client may say of a task.
func (s *Store) Replace(ctx context.Context, t Target, r Replacement) (Task, error) {
	return s.change(ctx, t, `UPDATE tasks SET title = $4, description = $5, completed = $6, `+step+target+returning,
		r.Title, r.Description, r.Completed)
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

// Complete sets whether a task is completed; nil turns it into the opposite.
func (s *Store) Complete(ctx context.Context, t Target, completed *bool) (Task, error) {
	return s.change(ctx, t, `UPDATE tasks SET completed = coalesce($4, NOT completed), `+step+target+returning, completed)
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
func (s *Store) one(ctx context.Context, query string, args ...any) (t Task, err error) {
	if err := s.begin(ctx); err != nil {
		return Task{}, err
	}
	defer s.end()
	t, err = scan(s.db.QueryRowContext(ctx, query, args...))
	if err == nil {
		// The row may have come before the end of the transaction did, and
		// database/sql does not report what becomes of a statement whose
		// context ends in between.
		err = ctx.Err()
	}
	if errors.Is(err, sql.ErrNoRows) {
		return Task{}, ErrNotFound
	}
	return t, unavailable(ctx, err)
}

// many runs a statement that returns tasks.
func (s *Store) many(ctx context.Context, query string, args ...any) ([]Task, error) {
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	rows, err := s.db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, unavailable(ctx, err)
	}
	defer rows.Close()
	tasks := make([]Task, 0, 16)
	for rows.Next() {
		t, err := scan(rows)
		if err != nil {
			return nil, unavailable(ctx, err)
		}
		tasks = append(tasks, t)
	}
	return tasks, unavailable(ctx, rows.Err())
}

// scan reads the columns of one task.
func scan(row interface{ Scan(...any) error }) (t Task, err error) {
	err = row.Scan(&t.ID, &t.UserID, &t.Title, &t.Description, &t.Completed, &t.Version, &t.CreatedAt, &t.UpdatedAt)
	t.CreatedAt, t.UpdatedAt = t.CreatedAt.UTC(), t.UpdatedAt.UTC()
	return t, err
}

// begin waits for a turn on the pool, which [Store.end] gives back. Turns come
// in the order of asking; database/sql alone serves in no order, so that under
// load some requests would wait until their deadline.
func (s *Store) begin(ctx context.Context) error {
	if s.turns == nil {
		return nil
	}
	select {
	case s.turns <- struct{}{}:
		return nil
	case <-ctx.Done():
		return unavailable(ctx, ctx.Err())
	}
}

func (s *Store) end() {
	if s.turns != nil {
		<-s.turns
	}
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
