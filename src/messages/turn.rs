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
use crate::balancer::Lease;
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
    /// Of its last attempt; a failure in it is what the client may see.
    pub(super) end: Box<End>,
    /// The client must see the failure, whatever the outcome of the last attempt would allow.
    pub(super) is_final: bool,
}

impl Turn<'_> {
    /// Runs it to its end.
    #[inline(never)]
    pub(super) fn run(&self, record: &mut Record<'_>) -> Turned {
        let (mut paths, reasons) = self.paths();
        let mut first: Option<Box<End>> = None;
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
            let end = attempt.run(self.lease.payload());
            let Report { status, usage, head_at, why, .. } = &end.report;
            let reported = Reported { status: *status, usage: *usage, head_at: *head_at, why };
            record.end_attempt(&end.outcome, reported, env::now());
            let lesson = self.lesson(&end, &paths);
            if let Some(path) = newest.filter(|path| is_content(path, &end, lesson.is_some())) {
                self.remember(path);
            }
            match lesson {
                Some(path) if paths.len() - reasons.len() < LESSONS_MAX => {
                    paths.push(path);
                    self.messages.compat.memory.count_extra_attempt();
                    first.get_or_insert(end);
                }
                _ => return turned(end, first, record),
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
    #[inline(never)]
    fn lesson(&self, end: &End, paths: &[Path]) -> Option<Path> {
        let said = refusal(end)?;
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
    #[inline(never)]
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

/// The body of a refusal that names what is wrong with the request.
fn refusal(end: &End) -> Option<&[u8]> {
    let Outcome::Refused { status: 400, meaning: Meaning::Other, .. } = end.outcome else { return None };
    match &end.attempted {
        Attempted::Failed(Failure::Upstream { body, .. }) => Some(body),
        _ => None,
    }
}

/// True when the endpoint refuses the request still, but for another reason: as far as this field goes it is content.
fn is_content(path: &Path, end: &End, has_next_lesson: bool) -> bool {
    refusal(end)
        .is_some_and(|body| has_next_lesson || memchr::memmem::find(body, path.key().as_bytes()).is_none())
}

/// After more attempts than one that all failed the client sees the first failure.
#[inline(never)]
fn turned(mut end: Box<End>, first: Option<Box<End>>, record: &mut Record<'_>) -> Turned {
    let is_final = first.is_some() && matches!(end.attempted, Attempted::Failed(_));
    let mut shown = end.report.request_id.take();
    if let Some(first) = first.filter(|_| is_final) {
        (end.attempted, shown) = (first.attempted, first.report.request_id);
    }
    record.shown_id = shown.unwrap_or_default();
    Turned { end, is_final }
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
    #[inline(never)]
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
