//! The balancer's changes in plain words, each with what the operator can do about it.

use crate::balancer::breaker::Change as BreakerChange;
use crate::balancer::cooldown::{Parked, Reason};
use crate::balancer::{Change, Notice};

/// Writes one line. `why` is what the attempt that caused it told.
pub(super) fn log(notice: &Notice, why: &str) {
    let name = &notice.endpoint;
    match &notice.change {
        Change::Breaker(BreakerChange::Opened { failures, span }) => {
            log::warn!(
                "{name} is taken out after {failures} failures in a row; tried again in {span:.0?}: {why}"
            );
        }
        Change::Breaker(BreakerChange::Reopened { span }) => {
            log::warn!("{name} still fails; tried again in {span:.0?}: {why}");
        }
        Change::Breaker(BreakerChange::Closed) => log::info!("{name} works again"),
        Change::Parked(Parked { model, reason, span }) => {
            let model = model.as_deref().unwrap_or("all models");
            match reason {
                Reason::Limited => {
                    log::warn!("{name} is over its limit for {model}; it rests for {span:.0?}: {why}");
                }
                Reason::ModelUnavailable => log::error!(
                    "{name} does not serve {model}; not asked for it for {span:.0?}: {why} (enable the model there, or \
                     list under endpoints[].models what it serves)"
                ),
                Reason::NoToken => log::error!(
                    "{name} has no token; tried again in {span:.0?}: {why} (check token_file or oauth)"
                ),
                Reason::AskedToWait => log::warn!("{name} asked for a pause of {span:.0?}: {why}"),
                Reason::Rejected => log::error!(
                    "{name} rejects its token or our address; tried again in {span:.0?}: {why} (renew the token, or \
                     allow this machine's address in the workspace)"
                ),
            }
        }
    }
}
