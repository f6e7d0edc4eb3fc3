//! How a conversation stands with the endpoint it is bound to, and what becomes of that with each request. Under the
//! balancer's lock; the table of bindings itself is `affinity`.

use std::time::Instant;

use super::affinity::{self, Session};
use super::decision::{Course, Decision, Home, Out, totals};
use super::strategy::Candidate;
use super::{EndpointId, Inner};

/// How the endpoint that a conversation is bound to stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It can take the request.
    Free(usize),
    /// It has too much to do, or has just failed this very request: the binding is kept. With the endpoint of the
    /// last detour, if that can take it.
    Busy(Option<usize>),
    /// Broken, cooling, parked or gone: the conversation moves; to the endpoint of the last detour, if that can take it.
    Out(Option<usize>),
    /// There is none.
    Unbound,
}

impl<T> Inner<T> {
    /// Where a conversation is bound.
    pub(super) fn home(&self, session: Session, now: Instant) -> Home {
        let Some(id) = self.affinity.bound(session, now) else { return Home::None };
        self.members.iter().position(|member| member.id == id).map_or(Home::Removed, Home::At)
    }

    /// How the endpoint that a conversation is bound to can take this request.
    pub(super) fn standing(
        &self,
        session: Session,
        decision: &Decision,
        candidates: &[Candidate],
    ) -> Standing {
        let (total, weights) = totals(candidates);
        let may_take = |index: usize| {
            let candidate = candidates.iter().find(|c| c.index == index)?;
            affinity::may_stay(candidate.load(), total, candidate.weight, weights).then_some(index)
        };
        let home = match decision.home {
            Home::None => return Standing::Unbound,
            Home::At(index) => Some(index),
            Home::Removed => None,
        };
        if let Some(index) = home.and_then(may_take) {
            return Standing::Free(index);
        }
        let place = |id| self.members.iter().position(|member| member.id == id);
        let detour = self.affinity.detour(session).and_then(place).and_then(may_take);
        let home = home.and_then(|index| decision.of(index));
        match home.is_none_or(|home| home.out.is_some_and(Out::moves_conversations)) {
            true => Standing::Out(detour),
            false => Standing::Busy(detour),
        }
    }

    /// The conversation asks again: it is no longer awaited, but here.
    pub(super) fn came_back(&mut self, session: Session, now: Instant) {
        if let Some((id, answered)) = self.affinity.asks(session)
            && let Some(member) = self.member(id)
        {
            member.returns.came(answered, now);
        }
    }

    /// The conversation was answered by this endpoint: its cache is warm there, and its next request is expected
    /// where it is bound, which is elsewhere after a detour.
    pub(super) fn answered(&mut self, session: Session, by: EndpointId, now: Instant) {
        self.came_back(session, now);
        self.affinity.used(session, by, now);
        if let Some(id) = self.affinity.answered(session, now)
            && let Some(member) = self.member(id)
        {
            member.returns.await_one(now);
        }
    }

    /// Counts where a conversation's request went, and binds it there unless it is only passing.
    pub(super) fn note(
        &mut self,
        session: Session,
        standing: Standing,
        decision: &Decision,
        index: usize,
        now: Instant,
    ) -> Course {
        let (id, counts) = (self.members[index].id, &mut self.affinity.counts);
        let course = match standing {
            Standing::Free(_) => {
                counts.hits += 1;
                Course::Hit
            }
            Standing::Busy(_) => {
                counts.detours += 1;
                self.affinity.note_detour(session, id);
                return Course::Detour;
            }
            Standing::Out(_) => {
                counts.moves += 1;
                counts.moved_because.count(decision.home_out());
                Course::Move
            }
            Standing::Unbound => {
                counts.new += 1;
                Course::New
            }
        };
        self.affinity.bind(session, id, now);
        course
    }
}
