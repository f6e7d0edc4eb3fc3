//! The balancer's changes in plain words, each with what the operator can do about it.

use crate::balancer::breaker::Change as BreakerChange;
use crate::balancer::cooldown::{Parked, Reason, Recovered};
use crate::balancer::{Change, Notice};

/// Writes one line. `why` is what the attempt that caused it told.
pub(super) fn log(notice: &Notice, why: &str) {
    let name = &notice.endpoint;
    match &notice.change {
        Change::Breaker(change) => breaker(name, change, why),
        Change::Parked(parked) => put_aside(name, parked, why),
        Change::Recovered(Recovered { model: Some(model), .. }) => {
            log::info!("{name} takes requests for {model} again");
        }
        Change::Recovered(Recovered { model: None, .. }) => log::info!("{name} takes requests again"),
    }
}

fn breaker(name: &str, change: &BreakerChange, why: &str) {
    let remedy = "check the workspace's status and the way to it; POST /reset ends the pause";
    match change {
        BreakerChange::Opened { failures, span } => log::warn!(
            "{name} is taken out after {failures} failures in a row; tried again in {span:.0?}: {why} ({remedy})"
        ),
        BreakerChange::OpenedByRate { failed, calls, window, span } => log::warn!(
            "{name} is taken out: {failed} of its last {calls} requests failed within {window:.0?}; tried again in \
             {span:.0?}: {why} ({remedy})"
        ),
        BreakerChange::Reopened { span } => {
            log::warn!("{name} still fails; tried again in {span:.0?}: {why} ({remedy})");
        }
        BreakerChange::Closed => log::info!("{name} works again; its share grows back over 10 s"),
    }
}

fn put_aside(name: &str, parked: &Parked, why: &str) {
    let Parked { model, reason, span } = parked;
    let model = model.as_deref().unwrap_or("all models");
    match reason {
        Reason::Limited => log::warn!(
            "{name} is over its limit for {model}; it rests for {span:.0?}: {why} (it comes back by itself; if this \
             happens often, add a workspace or have its limit raised)"
        ),
        Reason::Overloaded => log::warn!(
            "{name} is overloaded for {model}; it rests for {span:.0?}: {why} (it comes back by itself; if this \
             happens often, add a workspace)"
        ),
        Reason::ModelUnavailable => log::error!(
            "{name} does not serve {model}; not asked for it for {span:.0?}: {why} (enable the model there, or list \
             under endpoints[].models what it serves)"
        ),
        Reason::NoToken => {
            log::error!("{name} has no token; tried again in {span:.0?}: {why} (check token_file or oauth)");
        }
        Reason::AskedToWait => log::warn!(
            "{name} asked for a pause of {span:.0?}: {why} (it comes back by itself; check the workspace's status)"
        ),
        Reason::Rejected => log::error!(
            "{name} rejects its token: renew it, or let it query the model; tried again in {span:.0?}: {why} (after \
             a renewal POST /reset tries it at once)"
        ),
        Reason::AddressBlocked => log::error!(
            "{name} blocks this machine's address: allow it in the workspace's IP access list; tried again in \
             {span:.0?}: {why}"
        ),
    }
}
