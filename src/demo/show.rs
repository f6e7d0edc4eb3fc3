//! Prints the demo: at most 80 columns, plain unless it is looked at on a terminal, and every word at once.
//!
//! A stdout that was closed stops nothing; what cannot be printed is dropped.

use std::io::{IsTerminal as _, Write};

const COLUMNS: usize = 80;
const INDENT: &str = "  ";
const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// Where the demo is printed.
pub(super) struct Show {
    out: Box<dyn Write + Send>,
    is_styled: bool,
    /// Columns used in the line that text is being added to.
    column: usize,
    /// A blank that is printed once a word follows in the same line.
    is_blank_due: bool,
}

impl Show {
    /// On stdout, styled for a terminal unless NO_COLOR (see no-color.org) or a dumb terminal forbids it.
    pub(super) fn on_stdout() -> Self {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let out = std::io::stdout();
        let is_styled = out.is_terminal() && !is_set("NO_COLOR") && !is_dumb;
        Self { out: Box::new(out), is_styled, column: 0, is_blank_due: false }
    }

    /// A title, with an empty line before it.
    pub(super) fn heading(&mut self, title: &str) {
        let title = self.styled(BOLD, title);
        self.print(&format!("\n{title}\n"));
    }

    /// A line, or several.
    pub(super) fn line(&mut self, text: &str) {
        self.print(&format!("{text}\n"));
    }

    /// What is to be known about the text above.
    pub(super) fn note(&mut self, text: &str) {
        let note = self.styled(DIM, &format!("{INDENT}-> {text}"));
        self.print(&format!("{note}\n"));
    }

    /// A piece of a text that is still coming, wrapped between words.
    pub(super) fn text(&mut self, piece: &str) {
        for part in piece.split_inclusive(' ') {
            let word = part.trim_end_matches(' ');
            let width = word.chars().count() + usize::from(self.is_blank_due);
            if self.column > 0 && self.column + width > COLUMNS {
                self.end_text();
            }
            if self.column == 0 {
                self.print(INDENT);
                self.column = INDENT.len();
            }
            if std::mem::take(&mut self.is_blank_due) {
                self.print(" ");
                self.column += 1;
            }
            self.print(word);
            self.column += word.chars().count();
            self.is_blank_due = part.len() > word.len();
        }
    }

    /// The text is over; the next one begins a line of its own.
    pub(super) fn end_text(&mut self) {
        if self.column > 0 {
            self.print("\n");
            (self.column, self.is_blank_due) = (0, false);
        }
    }

    fn styled(&self, style: &str, text: &str) -> String {
        if self.is_styled { format!("{style}{text}{PLAIN}") } else { text.to_string() }
    }

    fn print(&mut self, text: &str) {
        let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
    }
}

#[cfg(test)]
pub(super) struct Printed(std::sync::Arc<parking_lot::Mutex<Vec<u8>>>);

#[cfg(test)]
impl Printed {
    pub(super) fn text(&self) -> String {
        String::from_utf8(self.0.lock().clone()).unwrap()
    }
}

#[cfg(test)]
impl Show {
    /// Unstyled, for tests to look at.
    pub(super) fn into_memory() -> (Self, Printed) {
        struct Memory(std::sync::Arc<parking_lot::Mutex<Vec<u8>>>);
        impl Write for Memory {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let bytes = std::sync::Arc::default();
        let out = Box::new(Memory(std::sync::Arc::clone(&bytes)));
        (Self { out, is_styled: false, column: 0, is_blank_due: false }, Printed(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_wrapped_between_words_however_it_arrives() {
        let text = "Some words that are long enough to need more than one line of eighty columns. ".repeat(3);
        for pieces in [vec![text.as_str()], text.split_inclusive(' ').collect()] {
            let (mut show, printed) = Show::into_memory();
            pieces.iter().for_each(|piece| show.text(piece));
            show.end_text();
            let shown = printed.text();
            assert!(shown.lines().all(|line| line.trim() == &line[INDENT.len()..] && line.len() <= COLUMNS));
            assert_eq!(
                shown.split_whitespace().collect::<Vec<_>>(),
                text.split_whitespace().collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn style_is_for_terminals_only() {
        let (mut show, printed) = Show::into_memory();
        show.heading("Title");
        show.note("note");
        assert_eq!(printed.text(), "\nTitle\n  -> note\n");
        show.is_styled = true;
        show.note("note");
        assert!(printed.text().ends_with("\x1b[2m  -> note\x1b[0m\n"));
    }

    #[test]
    fn a_closed_stdout_stops_nothing() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
        }
        let mut show = Show { out: Box::new(Closed), is_styled: true, column: 0, is_blank_due: false };
        show.text("word");
        show.end_text();
        show.line("line");
    }
}
