//! One endpoint's turn at a request: an attempt, and as long as it names a field that it does not know, another one
//! without that field.
//!
//! A field that the endpoint then no longer complains about is remembered for the endpoint and the model, and left out
//! beforehand from then on. When the request does not succeed without the fields either, the client sees the first
//! refusal, untouched: it repairs itself from these words.

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;

use super::attempt::{Attempt, Attempted, End};
use super::learned::{Memory, Reason};
use super::prepare::Prepared;
use super::surface::Failure;
use super::{Messages, Report};
use crate::access::{Record, Reported};
use crate::anthropic::compat::{PATHS_MAX, Path, cuts, rejected_path, without_betas};
use crate::anthropic::edit::{Edit, in_order};
use crate::anthropic::sse::Usage;
use crate::balancer::Lease;
use crate::balancer::limits::Kind;
use crate::env;
use crate::front::Exchange;
use crate::outcome::{Meaning, Outcome};
use crate::relay::Downstream;
use crate::upstream::Workspace;

/// Fields that one request may bring to light.
const LESSONS_MAX: usize = 3;

/// How requests are made to fit.
pub struct Compat {
    /// Whether refusals teach.
    pub learns: bool,
    /// What is always left out.
    pub strip: Vec<Path>,
    /// What was learned, and how often.
    pub memory: std::sync::Arc<Memory>,
}

/// One endpoint's turn.
pub(super) struct Turn<'a> {
    pub(super) messages: &'a Messages,
    pub(super) exchange: &'a Exchange,
    pub(super) prepared: &'a Prepared<'a>,
    pub(super) downstream: &'a Rc<Downstream>,
    pub(super) lease: &'a Lease<Workspace>,
}

/// The end of a turn.
pub(super) struct Turned {
    /// What became of the client's answer.
    pub(super) attempted: Attempted,
    /// How the last attempt ended: who is to blame.
    pub(super) outcome: Outcome,
    /// For the log: what failed.
    pub(super) why: String,
    /// Tokens, as far as the workspace told.
    pub(super) usage: Usage,
    /// The limit that was exceeded, as the workspace names it.
    pub(super) limited_by: Option<Kind>,
    /// The client must see the failure, whatever the outcome of the last attempt would allow.
    pub(super) is_final: bool,
}

impl Turn<'_> {
    /// Runs it to its end.
    pub(super) fn run(&self, record: &mut Record<'_>) -> Turned {
        let (mut paths, reasons) = self.paths();
        let mut first: Option<(Failure, Report)> = None;
        loop {
            let fitted = Fitted::new(self.prepared, &paths);
            record.begin_attempt(env::now());
            if first.is_none() {
                self.count_changes(&paths, &reasons, fitted.removed);
            }
            let headers = fitted.headers(self.prepared);
            let newest = paths.get(reasons.len()..).and_then(<[Path]>::last);
            // At once: the client's next request may come before this answer has ended.
            let accepted = || newest.into_iter().for_each(|path| self.remember(path));
            let attempt = Attempt {
                messages: self.messages,
                exchange: self.exchange,
                prepared: self.prepared,
                edits: &fitted.edits,
                headers: &headers,
                accepted: &accepted,
                downstream: self.downstream,
                id: &record.id.clone(),
                made: record.attempts(),
            };
            let End { attempted, outcome, report } = attempt.run(self.lease.payload());
            let Report { status, usage, head_at, why, .. } = &report;
            let reported = Reported { status: *status, usage: *usage, head_at: *head_at, why };
            record.end_attempt(&outcome, reported, env::now());
            let lesson = self.lesson(&attempted, &outcome, &paths);
            if let Some(path) = newest.filter(|path| is_content(path, &attempted, &outcome, lesson.is_some()))
            {
                self.remember(path);
            }
            match (lesson, attempted) {
                (Some(path), Attempted::Failed(failure)) if paths.len() - reasons.len() < LESSONS_MAX => {
                    paths.push(path);
                    self.messages.compat.memory.count_extra_attempt();
                    first.get_or_insert((failure, report));
                }
                (_, attempted) => return end(attempted, outcome, report, first, record),
            }
        }
    }

    /// What is left out beforehand, and why.
    fn paths(&self) -> (Vec<Path>, Vec<Reason>) {
        let compat = &self.messages.compat;
        let mut paths = compat.strip.clone();
        let mut reasons = vec![Reason::Configured; paths.len()];
        if compat.learns {
            let known = compat.memory.known(self.lease.id(), &self.prepared.model, env::now());
            paths.extend(known);
            reasons.resize(paths.len(), Reason::Learned);
        }
        (paths, reasons)
    }

    /// The field that this refusal is about, if the request can go out without it.
    fn lesson(&self, attempted: &Attempted, outcome: &Outcome, paths: &[Path]) -> Option<Path> {
        let Outcome::Refused { status: 400, meaning: Meaning::Other, .. } = outcome else { return None };
        let Attempted::Failed(Failure::Upstream { body: said, .. }) = attempted else { return None };
        if !self.messages.compat.learns || paths.len() >= PATHS_MAX {
            return None;
        }
        let body = self.prepared.kept.body()?;
        let path = Path::rejected(&rejected_path(said)?, &body)?;
        // What is left out already, by itself or with what holds it, was not in what was sent.
        let (_, found) = cuts(&body, &[paths, std::slice::from_ref(&path)].concat())?;
        (found >> paths.len() & 1 == 1 && !paths.contains(&path)).then_some(path)
    }

    fn remember(&self, path: &Path) {
        let memory = &self.messages.compat.memory;
        memory.learn(self.lease.id(), &self.prepared.model, path, env::now());
        self.count(&path.to_string(), Reason::Learned);
    }

    /// What was changed beforehand.
    fn count_changes(&self, paths: &[Path], reasons: &[Reason], removed: u64) {
        if self.prepared.is_downgraded {
            self.count("thinking.type", Reason::Model);
        }
        if removed != 0 {
            for (at, (path, reason)) in paths.iter().zip(reasons).take(PATHS_MAX).enumerate() {
                if removed >> at & 1 == 1 {
                    self.count(&path.to_string(), *reason);
                }
            }
        }
    }

    fn count(&self, path: &str, reason: Reason) {
        let (name, model) = (&self.lease.payload().name, &self.prepared.model);
        if !self.messages.compat.memory.count(self.lease.id(), name, model, path, reason) {
            return;
        }
        match reason {
            Reason::Learned => log::info!(
                "{name} refuses {path} for {model}: left out from now on, tried again in 24 h (compat.mode: off keeps it)"
            ),
            Reason::Configured => log::info!("{name}: {path} is left out for {model} (compat.strip)"),
            Reason::Model => log::info!(
                "{name}: {model} knows no adaptive thinking; it is asked for enabled thinking with a budget"
            ),
        }
    }
}

/// True when the endpoint refuses the request still, but for another reason: as far as this field goes it is content.
fn is_content(path: &Path, attempted: &Attempted, outcome: &Outcome, has_next_lesson: bool) -> bool {
    let is_refusal = matches!(outcome, Outcome::Refused { status: 400, meaning: Meaning::Other, .. });
    match attempted {
        Attempted::Failed(Failure::Upstream { body, .. }) if is_refusal => {
            has_next_lesson || memchr::memmem::find(body, path.key().as_bytes()).is_none()
        }
        _ => false,
    }
}

fn end(
    attempted: Attempted,
    outcome: Outcome,
    report: Report,
    first: Option<(Failure, Report)>,
    record: &mut Record<'_>,
) -> Turned {
    let Report { why, usage, limited_by, request_id, .. } = report;
    match (attempted, first) {
        (Attempted::Failed(_), Some((failure, shown))) => {
            record.shown_id = shown.request_id.unwrap_or_default();
            Turned { attempted: Attempted::Failed(failure), outcome, why, usage, limited_by, is_final: true }
        }
        (attempted, _) => {
            record.shown_id = request_id.unwrap_or_default();
            Turned { attempted, outcome, why, usage, limited_by, is_final: false }
        }
    }
}

/// What is other in a request for one endpoint. Without anything to leave out it is what it is for all.
struct Fitted {
    edits: Arc<[Edit]>,
    /// Which of the paths were there, one bit each.
    removed: u64,
    /// Values of `anthropic-beta` headers that change, by the header's place.
    betas: Vec<(usize, Option<String>)>,
}

impl Fitted {
    /// The paths are looked up in the client's bytes, whatever else changes in them.
    fn new(prepared: &Prepared<'_>, paths: &[Path]) -> Self {
        let body = if paths.is_empty() { None } else { prepared.kept.body() };
        let found = body.and_then(|body| cuts(&body, paths));
        let Some((mut edits, removed)) = found else {
            return Self { edits: Arc::clone(&prepared.edits), removed: 0, betas: Vec::new() };
        };
        edits.extend_from_slice(&prepared.edits);
        let gone = paths.iter().take(PATHS_MAX).enumerate().filter(|(at, _)| removed >> at & 1 == 1);
        let prefixes: Vec<&str> = gone.flat_map(|(_, path)| path.betas()).copied().collect();
        let lists = prepared.headers.iter().enumerate();
        let lists = lists.filter(|(_, (name, _))| name.eq_ignore_ascii_case("anthropic-beta"));
        let betas = lists
            .filter(|_| !prefixes.is_empty())
            .filter_map(|(at, (_, list))| Some((at, without_betas(str::from_utf8(list).ok()?, &prefixes))))
            .collect();
        Self { edits: in_order(edits).into(), removed, betas }
    }

    fn headers<'s>(&'s self, prepared: &'s Prepared<'_>) -> Cow<'s, [(&'s str, &'s [u8])]> {
        let whole = &prepared.headers;
        if self.betas.is_empty() {
            return Cow::Borrowed(whole);
        }
        let changed = whole.iter().enumerate().filter_map(|(at, (name, value))| {
            match self.betas.iter().find(|(place, _)| *place == at) {
                Some((_, list)) => list.as_deref().map(|list| (*name, list.as_bytes())),
                None => Some((*name, *value)),
            }
        });
        Cow::Owned(changed.collect())
    }
}
