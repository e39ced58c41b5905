package main

// store.go keeps tasks in PostgreSQL: the SQL, operation by operation, and below
// it what all tables share. Each change is one statement, so PostgreSQL
// applies it whole or not at all. {schema} in a statement stands for the schema
// of the tables, because search_path may be another client's behind a pooler.

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
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

//go:embed schema.sql
var schema string

// Store keeps tasks. Its methods may be called from many goroutines. The
// errors of its operations are those of task.go. After [ErrUnavailable] a write may
// have been applied, or may still be, at most once. Any other error is a defect, or
// a value that breaks a constraint.
type Store struct {
	*database
	tasks *table[Task]
}

// NewStore returns a Store on a pool. The pool's limit of open connections must
// not change afterwards.
func NewStore(db *sql.DB) *Store {
	d := &database{db: db, turns: make(chan struct{}, cmp.Or(db.Stats().MaxOpenConnections, math.MaxInt32))} // takes no memory
	tasks := newTable(d, "tasks", "id uuid, user_id text, title text, description text, completed boolean, "+
		"version bigint, created_at timestamptz, updated_at timestamptz", func(t *Task) []any {
		return []any{&t.ID, &t.UserID, &t.Title, &t.Description, &t.Completed, &t.Version, &t.CreatedAt, &t.UpdatedAt}
	})
	return &Store{d, tasks}
}

// Migrate applies schema.sql, or says what the service needs and does not find.
// Any number of starts may run it at once, and a complete schema is left as it
// is. After [ErrUnavailable], try again: the database is out of reach, or the table
// locked.
func (s *Store) Migrate(ctx context.Context) error {
	// READ COMMITTED: a start that has waited for another one sees what it committed.
	_, err := s.db.ExecContext(ctx, "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; "+schema)
	if err == nil {
		_, err = s.qualify(ctx, "") // finds the schema, so that no request has to
	}
	if err == nil || ctx.Err() == nil && !transient(err) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// Ping checks that the database responds. Its errors are [ErrUnavailable].
func (s *Store) Ping(ctx context.Context) error {
	if err := s.db.PingContext(ctx); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return nil
}

// Create makes a task. If the owner has used the key before, Create returns the
// existing task and true, or [ErrKeyReused] if the draft differs. An empty key
// means no key. Create does not check the rules of task.go, as the Handler does;
// a draft that breaks a constraint is an error of the driver.
func (s *Store) Create(ctx context.Context, d TaskDraft, key string) (t Task, replayed bool, err error) {
	now := s.now()
	t = Task{newID(now), d.UserID, d.Title, d.Description, d.Completed, 1, now, now}
	return s.tasks.create(ctx, t, key, d)
}

// List returns a page of tasks and reports whether more follow.
func (s *Store) List(ctx context.Context, f Filter) ([]Task, bool, error) {
	return s.tasks.list(ctx, f)
}

// Get returns a task. It ignores NoneMatch: to its caller a match is no error.
func (s *Store) Get(ctx context.Context, t Target) (Task, error) { return s.tasks.get(ctx, t) }

// Patch changes the members that the patch has. An empty patch changes nothing.
// Like Create, Patch does not check the rules of task.go.
func (s *Store) Patch(ctx context.Context, t Target, p TaskPatch) (Task, error) {
	if p == (TaskPatch{}) {
		return s.tasks.check(ctx, t)
	}
	var q statement
	set := bumpVersion
	if p.Title != nil {
		set += ", title = " + q.bind(*p.Title)
	}
	if p.Description.Set {
		set += ", description = " + q.bind(p.Description.Value)
	}
	if p.Completed != nil {
		set += ", completed = " + q.bind(*p.Completed)
	}
	return s.tasks.change(ctx, t, &q, "UPDATE {schema}.tasks SET "+set)
}

// Flip inverts whether a task is completed.
func (s *Store) Flip(ctx context.Context, t Target) (Task, error) {
	return s.tasks.change(ctx, t, &statement{}, "UPDATE {schema}.tasks SET "+bumpVersion+", completed = NOT completed")
}

// Delete deletes a task.
func (s *Store) Delete(ctx context.Context, t Target) error {
	_, err := s.tasks.change(ctx, t, &statement{}, "DELETE FROM {schema}.tasks")
	return err
}

// bumpVersion is the bookkeeping that all updates share. now() is when a
// transaction began, so a later update may have an earlier one; hence greatest.
const bumpVersion = "version = version + 1, updated_at = greatest(updated_at, now())"

// database is a pool, and what all tables on it share.
type database struct {
	db     *sql.DB
	turns  chan struct{} // has an element for each connection in use
	last   atomic.Int64  // the latest time that now returned, in microseconds
	schema atomic.Pointer[string]
}

// now returns the time in microseconds, PostgreSQL's unit. It never returns the
// same time twice, so rows of one Store sort as they were created.
func (d *database) now() time.Time {
	for {
		last := d.last.Load()
		now := max(time.Now().UnixMicro(), last+1)
		if d.last.CompareAndSwap(last, now) {
			return time.UnixMicro(now).UTC()
		}
	}
}

// qualify replaces {schema} by the first schema on the search_path that the pool
// itself asks for. Another client of a pooler may have left another search_path
// in the session, so it is reset, for one statement alone.
func (d *database) qualify(ctx context.Context, text string) (string, error) {
	name := d.schema.Load()
	if name == nil {
		name = new(string)
		err := d.db.QueryRowContext(ctx, `
		SELECT quote_ident(current_schema())
		FROM (SELECT set_config('search_path', reset_val, true) AS path FROM pg_settings WHERE name = 'search_path') AS reset
		WHERE path IS NOT NULL`).Scan(name)
		if err != nil {
			return "", fmt.Errorf("find the schema of search_path: %w", err)
		}
		d.schema.Store(name)
	}
	return strings.ReplaceAll(text, "{schema}", *name), nil
}

// statement holds the arguments of a statement that is written in pieces.
// Conditions that do not apply are left out, so PostgreSQL does not plan them.
type statement struct{ args []any }

// bind adds an argument and returns its placeholder.
func (s *statement) bind(arg any) string {
	s.args = append(s.args, arg)
	return "$" + strconv.Itoa(len(s.args))
}

// where returns the conditions for a target.
func (s *statement) where(t Target) string {
	where := " WHERE id = " + s.bind(t.ID)
	if t.Owner != nil {
		where += " AND user_id = " + s.bind(*t.Owner)
	}
	if t.Match != nil {
		where += " AND version = ANY (" + s.bind(t.Match) + ")"
	}
	if t.NoneMatch != nil {
		where += " AND version <> ALL (" + s.bind(t.NoneMatch) + ")"
	}
	if t.NoneMatchAny {
		where += " AND false"
	}
	return where
}

// A table holds values of type T. Besides their columns it has the columns
// idempotency_key and idempotency_digest.
type table[T resource] struct {
	*database
	fields    func(*T) []any // pointers to the fields of a value, in the order of the columns
	selects   string         // SELECT … FROM
	inserts   string         // INSERT of $1, a JSON array with an array for each row; $2 is the key, $3 its digest
	returning string
	onRepeat  string                // what happens when the key exists, and RETURNING
	fetches   *batcher[string, []T] // a result has one row, or none
	creations *batcher[T, []T]
}

// newTable describes a table. columns are the columns of T with their types, each a
// word or two. An INSERT gets the fields as JSON and casts their texts to the types,
// so a field must be a string, a number, a boolean, a time, or a type whose JSON is
// what PostgreSQL reads.
func newTable[T resource](d *database, name, columns string, fields func(*T) []any) *table[T] {
	t := &table[T]{database: d, fields: fields}
	var names, values []string
	for i, definition := range strings.Split(columns, ", ") {
		column, kind, _ := strings.Cut(definition, " ")
		names, values = append(names, column), append(values, fmt.Sprintf("(new ->> %d)::%s", i, kind))
	}
	list := strings.Join(names, ", ")
	t.selects = "SELECT " + list + " FROM {schema}." + name
	t.inserts = "INSERT INTO {schema}." + name + " (" + list + ", idempotency_key, idempotency_digest)" +
		" SELECT " + strings.Join(values, ", ") + ", $2::text, $3::bytea FROM jsonb_array_elements($1) AS new"
	t.returning = " RETURNING " + list
	// DO UPDATE changes nothing. It makes RETURNING include a row that another
	// statement, perhaps still running, has inserted. If its digest differs, its
	// version is returned as 0, which no row has; create looks at that.
	t.onRepeat = " ON CONFLICT (coalesce(user_id, ''), idempotency_key) WHERE idempotency_key IS NOT NULL" +
		" DO UPDATE SET idempotency_key = excluded.idempotency_key" +
		regexp.MustCompile(`\bversion\b`).ReplaceAllLiteralString(t.returning, "CASE WHEN idempotency_digest = $3 THEN version ELSE 0 END")
	mayRepeat := func(err error) bool { return !errors.Is(err, ErrUnavailable) }
	t.fetches, t.creations = newBatcher(t.fetchAll, mayRepeat), newBatcher(t.createAll, mayRepeat)
	return t
}

// create inserts a row. With a key, content is what a repeat must agree with.
func (t *table[T]) create(ctx context.Context, row T, key string, content any) (made T, replayed bool, err error) {
	var rows []T
	if key == "" {
		rows, err = t.creations.do(ctx, row)
	} else {
		text, _ := json.Marshal(content) // cannot fail: texts, numbers and booleans
		digest := sha256.Sum256(text)
		rows, err = t.rows(ctx, t.inserts+t.onRepeat, t.records([]T{row}), key, digest[:])
	}
	made, err = one(rows, translate(ctx, err), errNotStored)
	own, _, _ := row.identity()
	id, _, version := made.identity()
	switch {
	case sqlState(err) == "23503": // foreign_key_violation
		err = fmt.Errorf("%w: %w", ErrUnknownUser, err)
	case err == nil && version == 0:
		err = ErrKeyReused
	}
	return made, id != own, err
}

// one returns the only row, or err, or absent if there is none.
func one[T any](rows []T, err, absent error) (row T, _ error) {
	if err != nil || len(rows) == 0 {
		return row, cmp.Or(err, absent)
	}
	return rows[0], nil
}

// errNotStored is the error of a row that the database has dropped.
var errNotStored = errors.New("a trigger or a policy of the database kept the row from being stored")

// createAll inserts rows, and returns them as they are stored.
func (t *table[T]) createAll(ctx context.Context, rows []T) ([][]T, error) {
	made, err := t.rows(ctx, t.inserts+t.returning, t.records(rows), nil, nil)
	ids := make([]string, len(rows))
	for i, row := range rows {
		ids[i], _, _ = row.identity()
	}
	return byID(made, ids), err
}

// records returns rows as a JSON array of arrays.
func (t *table[T]) records(rows []T) string {
	var all [][]any
	for i := range rows {
		all = append(all, t.fields(&rows[i]))
	}
	text, _ := json.Marshal(all) // cannot fail: strings, numbers, booleans and times
	return string(text)
}

// list returns a page of rows and reports whether more follow.
//
// Each page is one range of one index: the filter's columns, then id. For the
// completed tasks of a user it is
//
//	WHERE completed = ANY (ARRAY[true]) AND user_id <= $2 AND (user_id, id) > ((SELECT $2::text), $1)
//	ORDER BY completed, user_id, id LIMIT $3
//
// With a plain =, the planner assumes that matching rows are spread evenly, and may
// walk another index past millions of rows. = ANY means the same, but then only the
// right index has the requested order. This works for the first column only, so a
// second one is compared together with id, as a row. The planner estimates such a
// comparison by its first value and might sort the whole range; it cannot see a
// value in a subquery.
func (t *table[T]) list(ctx context.Context, f Filter) (rows []T, more bool, err error) {
	beyond, until, order, start := ">", "<=", "", "00000000-0000-0000-0000-000000000000"
	if f.Descending {
		beyond, until, order, start = "<", ">=", " DESC", "ffffffff-ffff-ffff-ffff-ffffffffffff"
	}
	var q statement
	after := q.bind(cmp.Or(f.After, start))
	where, by := "id "+beyond+" "+after, "id"+order
	switch {
	case f.Owner != nil && f.Completed != nil:
		owner := q.bind(*f.Owner)
		where = "user_id " + until + " " + owner + " AND (user_id, id) " + beyond + " ((SELECT " + owner + "::text), " + after + ")"
		by = "user_id" + order + ", " + by
	case f.Owner != nil:
		where = "user_id = ANY (ARRAY[" + q.bind(*f.Owner) + "]) AND " + where
		by = "user_id" + order + ", " + by
	}
	if f.Completed != nil {
		where = "completed = ANY (ARRAY[" + strconv.FormatBool(*f.Completed) + "]) AND " + where
		by = "completed" + order + ", " + by
	}
	rows, err = t.rows(ctx, t.selects+" WHERE "+where+" ORDER BY "+by+" LIMIT "+q.bind(f.Limit+1), q.args...)
	return rows[:min(len(rows), f.Limit)], len(rows) > f.Limit, err
}

// get returns a row, whatever the target's NoneMatch says.
func (t *table[T]) get(ctx context.Context, target Target) (row T, err error) {
	rows, err := t.fetches.do(ctx, target.ID)
	row, err = one(rows, translate(ctx, err), ErrNotFound)
	switch _, owner, version := row.identity(); {
	case err != nil:
	case target.Owner != nil && (owner == nil || *owner != *target.Owner):
		err = ErrNotFound
	case target.Match != nil && !slices.Contains(target.Match, version):
		err = ErrPrecondition
	}
	return row, err
}

// fetchAll returns the rows with the given ids.
func (t *table[T]) fetchAll(ctx context.Context, ids []string) ([][]T, error) {
	rows, err := t.rows(ctx, t.selects+" WHERE id = ANY ($1)", "{"+strings.Join(ids, ",")+"}")
	return byID(rows, ids), err
}

// byID returns for each id the row that has it, or none.
func byID[T resource](rows []T, ids []string) [][]T {
	all := make([][]T, len(ids))
	for i := range rows {
		id, _, _ := rows[i].identity()
		for j := range ids {
			if ids[j] == id {
				all[j] = rows[i : i+1]
			}
		}
	}
	return all
}

// check returns a row if it meets all conditions of the target.
func (t *table[T]) check(ctx context.Context, target Target) (T, error) {
	row, err := t.get(ctx, target)
	if _, _, version := row.identity(); err == nil && target.excludes(version) {
		return row, ErrPrecondition
	}
	return row, err
}

// change runs an UPDATE or a DELETE on a target and returns its row.
func (t *table[T]) change(ctx context.Context, target Target, q *statement, text string) (row T, err error) {
	rows, err := t.rows(ctx, text+q.where(target)+t.returning, q.args...)
	if err != nil || len(rows) > 0 {
		return one(rows, err, nil)
	}
	if _, err := t.get(ctx, target); err != nil {
		return row, err
	}
	if target.Match == nil && target.NoneMatch == nil && !target.NoneMatchAny {
		return row, errNotStored
	}
	return row, ErrPrecondition
}

// rows runs a statement and scans the rows that it returns. If the connection of a
// SELECT fails within lostTime, it was probably dead before: rows runs it again.
//
// It first waits for a turn, first come, first served. database/sql alone serves
// waiters in no order, so under load some would wait until their deadline.
func (t *table[T]) rows(ctx context.Context, text string, args ...any) (all []T, err error) {
	defer func() { err = translate(ctx, err) }()
	select {
	case t.turns <- struct{}{}:
		defer func() { <-t.turns }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	text, err = t.qualify(ctx, text)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	all, err = t.run(ctx, text, args)
	if strings.HasPrefix(text, "SELECT") && ctx.Err() == nil && time.Since(start) < lostTime && transient(err) && sqlState(err) == "" {
		all, err = t.run(ctx, text, args)
	}
	// A serialization failure or a deadlock has rolled the statement back. The manual
	// says to repeat it ("Serialization Failure Handling").
	for tries := 0; tries < 100 && ctx.Err() == nil && slices.Contains([]string{"40001", "40P01"}, sqlState(err)); tries++ {
		all, err = t.run(ctx, text, args)
	}
	return all, err
}

// run runs a statement on a pinned connection: on a pool that OpenDB has not made,
// database/sql would run it again after a lost connection, even if it took effect.
func (t *table[T]) run(ctx context.Context, text string, args []any) (all []T, err error) {
	conn, err := t.db.Conn(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	rows, err := conn.QueryContext(ctx, text, args...)
	if err != nil {
		return nil, err
	}
	defer func() { err = cmp.Or(err, rows.Close()) }()
	var row T
	fields := t.fields(&row)
	for rows.Next() {
		if err := rows.Scan(fields...); err != nil {
			return nil, err
		}
		all = append(all, row)
	}
	// The rows may arrive before the end of the transaction, and database/sql
	// does not report the fate of a statement whose context ends in between.
	return all, cmp.Or(rows.Err(), ctx.Err())
}

// translate makes an error of the driver one of the package's.
func translate(ctx context.Context, err error) error {
	_, unreachable := errors.AsType[*connectError](err)
	switch {
	case err == nil || errors.Is(err, ErrUnavailable):
		return err
	case ctx.Err() != nil || unreachable || transient(err):
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}
