-- The schema of the task service. Applied at every start as one batch, which
-- PostgreSQL runs as one transaction: all of it or nothing. Every statement is
-- idempotent. The lock comes first because CREATE … IF NOT EXISTS fails when
-- two sessions run it at once; it ends with the transaction, so that it holds
-- behind a transaction-mode pooler too.
SELECT pg_advisory_xact_lock(hashtext('tasks schema'));

-- The constraints repeat the rules of task.go, so that no other writer can
-- store what the service would refuse. text is never measured in bytes:
-- char_length counts code points.
CREATE TABLE IF NOT EXISTS tasks (
    id                 uuid        PRIMARY KEY,           -- version 7: sorts by creation
    user_id            text        CHECK (char_length(user_id) BETWEEN 1 AND 255),
    title              text        NOT NULL CHECK (char_length(title) <= 200),
    description        text        CHECK (char_length(description) <= 10000),
    completed          boolean     NOT NULL DEFAULT false,
    version            bigint      NOT NULL DEFAULT 1 CHECK (version >= 1),
    created_at         timestamptz NOT NULL DEFAULT now(),
    updated_at         timestamptz NOT NULL DEFAULT now(),
    idempotency_key    text,                              -- lives as long as its task
    idempotency_digest bytea,                             -- SHA-256 of what was asked for

    -- Not only white space. The list is Unicode's White_Space; E'\v' would be
    -- the letter v.
    CONSTRAINT tasks_title_blank CHECK (btrim(title, E'\u0009\u000A\u000B\u000C\u000D\u0020\u0085\u00A0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200A\u2028\u2029\u202F\u205F\u3000') <> ''),
    CONSTRAINT tasks_updated_at CHECK (updated_at >= created_at),
    CONSTRAINT tasks_idempotency CHECK ((idempotency_key IS NULL) = (idempotency_digest IS NULL))
);

-- One index for each way to list, each ending in id, so that a page is one
-- range of one index, in either direction, however deep and however rare the
-- tasks that match. No two begin with user_id: PostgreSQL might read all tasks
-- of a user from the one and sort them, in place of a page from the other. Per
-- task they cost about 40 bytes (completed) and 60 to 70 bytes (user_id) each,
-- and one insertion each at creation; an update touches them only when it
-- changes completed.
--
-- A look comes first, because CREATE INDEX IF NOT EXISTS waits for the end of
-- all writes to the table, and holds up others, even if there is nothing to do.
--
-- An Idempotency-Key belongs to an owner. No owner is one owner as well, for
-- which the empty string stands: no user_id is empty. (NULLS NOT DISTINCT would
-- say it better, but PostgreSQL 14 lacks it.)
DO $$
DECLARE
    schema text := quote_ident(current_schema()) || '.'; -- where CREATE TABLE has looked
BEGIN
    IF to_regclass(schema || 'tasks_completed_id') IS NULL THEN
        CREATE INDEX tasks_completed_id ON tasks (completed, id);
    END IF;
    IF to_regclass(schema || 'tasks_user_id_id') IS NULL THEN
        CREATE INDEX tasks_user_id_id ON tasks (user_id, id);
    END IF;
    IF to_regclass(schema || 'tasks_completed_user_id_id') IS NULL THEN
        CREATE INDEX tasks_completed_user_id_id ON tasks (completed, user_id, id);
    END IF;
    IF to_regclass(schema || 'tasks_idempotency_key') IS NULL THEN
        CREATE UNIQUE INDEX tasks_idempotency_key ON tasks (coalesce(user_id, ''), idempotency_key)
            WHERE idempotency_key IS NOT NULL;
    END IF;
END $$;
