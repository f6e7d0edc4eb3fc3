//! Changes to a request body, as places in it: what is sent is the client's own bytes with gaps and inserts, and
//! nothing is copied to leave something out.

use std::cmp::Reverse;
use std::ops::Range;

/// Other text, or none, in the place of a part of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// The part that goes.
    pub at: Range<usize>,
    /// What stands there instead.
    pub with: Box<str>,
}

impl Edit {
    /// Other text in the place of a part.
    pub fn exchange(at: Range<usize>, with: impl Into<Box<str>>) -> Self {
        Self { at, with: with.into() }
    }

    /// A part that is left out.
    pub fn cut(at: Range<usize>) -> Self {
        Self { at, with: Box::default() }
    }
}

/// Edits of several kinds in the order of their places. One within a part that another takes out goes with it.
pub fn in_order(mut edits: Vec<Edit>) -> Vec<Edit> {
    edits.sort_by_key(|edit| (edit.at.start, Reverse(edit.at.end)));
    let mut end = 0;
    edits.retain(|edit| {
        let stays = edit.at.start >= end;
        end = end.max(edit.at.end);
        stays
    });
    edits
}

/// The body as these edits leave it, in ascending order: a copy, for whoever needs it in one piece.
pub fn applied(body: &[u8], edits: &[Edit]) -> Vec<u8> {
    let (mut changed, mut copied) = (Vec::new(), 0);
    for Edit { at, with } in edits {
        changed.extend_from_slice(&body[copied..at.start]);
        changed.extend_from_slice(with.as_bytes());
        copied = at.end;
    }
    changed.extend_from_slice(&body[copied..]);
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_part_takes_the_smaller_along() {
        let edits = vec![
            Edit::exchange(8..9, "X"),
            Edit::exchange(3..4, "gone with the cut"),
            Edit::cut(2..6),
            Edit::exchange(6..7, "beside it"),
            Edit::cut(2..3),
        ];
        let edits = in_order(edits);
        assert_eq!(edits, [Edit::cut(2..6), Edit::exchange(6..7, "beside it"), Edit::exchange(8..9, "X")]);
        assert_eq!(applied(b"0123456789", &edits), b"01beside it7X9");
        assert_eq!(applied(b"0123", &[]), b"0123");
    }
}
