//! What goes to a workspace past ureq: header lines and body, sent from where they lie.
//!
//! ureq would make an object of each header and copy the body through a buffer of its own. So it is given a request
//! with a length and nothing else, and a body that only pretends to be read; the transport puts the client's lines at
//! the end of the head that ureq wrote, and the body behind it, in one send.

use std::io::{self, IoSlice};
use std::sync::Arc;

use crate::anthropic::edit::Edit;

/// Bytes that several may hold.
pub type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A request body, perhaps with parts of it exchanged. Cheap to clone.
#[derive(Clone)]
pub struct Pieces {
    whole: Bytes,
    /// In ascending order, none within another.
    edits: Arc<[Edit]>,
}

impl Pieces {
    /// These bytes with these changes, in ascending order and none within another.
    pub fn new(whole: Bytes, edits: Arc<[Edit]>) -> Self {
        Self { whole, edits }
    }

    /// In the order they are sent. Any may be empty.
    fn slices(&self) -> impl Iterator<Item = &[u8]> {
        let whole = (*self.whole).as_ref();
        let starts = std::iter::once(0).chain(self.edits.iter().map(|edit| edit.at.end));
        let ends = self.edits.iter().map(|edit| (edit.at.start, edit.with.as_bytes()));
        let ends = ends.chain(std::iter::once((whole.len(), &b""[..])));
        starts.zip(ends).flat_map(move |(start, (end, with))| [&whole[start..end], with])
    }

    /// Their length together.
    pub fn len(&self) -> usize {
        self.slices().map(<[u8]>::len).sum()
    }

    /// True when there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What the transport adds to ureq's head.
pub(super) struct Payload {
    /// Header lines, each with its line end.
    pub(super) lines: Vec<u8>,
    pub(super) body: Pieces,
}

impl Payload {
    /// All of a request: `head` is what ureq wrote, with its blank line.
    pub(super) fn slices<'a>(&'a self, head: &'a [u8]) -> Vec<IoSlice<'a>> {
        let open = &head[..head.len() - LINE_END.len()];
        let mut slices = Vec::with_capacity(5 + 2 * self.body.edits.len());
        slices.extend([open, &self.lines, LINE_END].map(IoSlice::new));
        slices.extend(self.body.slices().filter(|slice| !slice.is_empty()).map(IoSlice::new));
        slices
    }
}

const LINE_END: &[u8] = b"\r\n";

/// Where the head that ureq writes ends.
pub(super) const HEAD_END: &[u8] = b"\r\n\r\n";

/// A body that ureq may think it has copied.
pub(super) struct SentElsewhere {
    /// Bytes that ureq has not yet asked for.
    pub(super) left: usize,
}

impl io::Read for SentElsewhere {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.left);
        self.left -= count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(payload: &Payload, head: &[u8]) -> Vec<u8> {
        payload.slices(head).iter().flat_map(|slice| slice.to_vec()).collect()
    }

    #[test]
    fn lines_stand_in_the_head_and_the_body_behind_it() {
        let body: Bytes = Arc::new(b"{\"model\":\"a\"}".to_vec());
        let untouched = Pieces::new(Arc::clone(&body), Arc::default());
        let payload = Payload { lines: b"x-app: cli\r\n".to_vec(), body: untouched };
        let head = b"POST / HTTP/1.1\r\nhost: w\r\n\r\n";
        let expected = b"POST / HTTP/1.1\r\nhost: w\r\nx-app: cli\r\n\r\n{\"model\":\"a\"}";
        assert_eq!(sent(&payload, head), expected);
        let edits = [Edit::cut(0..1), Edit::exchange(9..12, "\"longer\""), Edit::cut(12..13)];
        let changed = Pieces::new(body, Arc::new(edits));
        assert_eq!((changed.len(), changed.is_empty()), (16, false));
        let expected = b"POST / HTTP/1.1\r\nhost: w\r\n\r\n\"model\":\"longer\"";
        assert_eq!(sent(&Payload { lines: Vec::new(), body: changed }, head), expected);
    }
}
