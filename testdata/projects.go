package tasks

// projects.go is a second resource: projects, under /api/projects.

import (
	"cmp"
	"net/http"
	"strconv"
	"time"
)

// Project is a project as it is stored, and as clients see it.
type Project struct {
	ID        string
	UserID    *string
	Name      string
	Version   int64
	CreatedAt time.Time
	UpdatedAt time.Time
}

// projectDraft is what creates a project, projectPatch what changes it.
type (
	projectDraft struct {
		UserID *string
		Name   string
	}
	projectPatch struct{ Name *string }
)

func (p Project) identity() (id string, owner *string, version int64) {
	return p.ID, p.UserID, p.Version
}

func (p Project) appendJSON(b []byte) []byte {
	b = append(b, `{"id":"`+p.ID+`","user_id":`...)
	b = appendString(b, p.UserID)
	b = append(b, `,"name":`...)
	b = appendString(b, &p.Name)
	b = append(b, `,"version":`...)
	b = strconv.AppendInt(b, p.Version, 10)
	b = append(b, `,"created_at":`...)
	b = appendTime(b, p.CreatedAt)
	b = append(b, `,"updated_at":`...)
	b = appendTime(b, p.UpdatedAt)
	return append(b, '}')
}

func decodeProjectDraft(body []byte) (projectDraft, error) {
	d := newDecoder(body)
	p := projectDraft{
		UserID: d.text("user_id", nullable, userIDViolations).Value,
		Name:   *cmp.Or(d.text("name", required, titleViolations).Value, new("")),
	}
	return p, d.end()
}

func decodeProjectPatch(body []byte) (projectPatch, error) {
	d := newDecoder(body)
	p := projectPatch{Name: d.text("name", optional, titleViolations).Value}
	return p, d.end()
}

// projects answers the requests on projects.
type projects struct{ *table[Project] }

// projectRoutes returns the routes of projects.
func (h *Handler) projectRoutes() []*route {
	p := projects{newTable(h.store.database, "projects", "id uuid, user_id text, name text, version bigint, created_at timestamptz, updated_at timestamptz",
		func(p *Project) []any {
			return []any{&p.ID, &p.UserID, &p.Name, &p.Version, &p.CreatedAt, &p.UpdatedAt}
		})}
	scope, page := []string{"user_id"}, []string{"user_id", "sort", "limit", "after"}
	return []*route{
		{h, "POST /api/projects", h.api(p.create, scope, []string{mediaTypeJSON})},
		{h, "GET /api/projects", h.api(p.list, page, nil)},
		{h, "GET /api/projects/{id}", h.api(p.get, scope, nil)},
		{h, "PATCH /api/projects/{id}", h.api(p.patch, scope, []string{mediaTypePatch, mediaTypeJSON})},
		{h, "DELETE /api/projects/{id}", h.api(p.delete, scope, nil)},
	}
}

func (p projects) create(r *request) (*response, error) {
	d, err := decodeProjectDraft(r.body)
	key, err := r.checkDraft(&d.UserID, err)
	if err != nil {
		return nil, err
	}
	now := p.now()
	project, replayed, err := p.table.create(r.Context(), Project{newID(now), d.UserID, d.Name, 1, now, now}, key, d)
	return created(r, project, replayed, err)
}

func (p projects) list(r *request) (*response, error) {
	page, more, err := p.table.list(r.Context(), r.Filter)
	return listed(r, page, more, err)
}

func (p projects) get(r *request) (*response, error) {
	project, err := p.table.get(r.Context(), r.target())
	return fetched(r, project, err)
}

func (p projects) patch(r *request) (*response, error) {
	patch, err := decodeProjectPatch(r.body)
	if err != nil {
		return nil, err
	}
	if patch == (projectPatch{}) {
		project, err := p.check(r.Context(), r.target())
		return changed(project, err)
	}
	var q statement
	set := bumpVersion + ", name = " + q.bind(*patch.Name)
	project, err := p.change(r.Context(), r.target(), &q, "UPDATE {schema}.projects SET "+set)
	return changed(project, err)
}

func (p projects) delete(r *request) (*response, error) {
	_, err := p.change(r.Context(), r.target(), &statement{}, "DELETE FROM {schema}.projects")
	return &response{status: http.StatusNoContent}, err
}
