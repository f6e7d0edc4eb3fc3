//! The shapes of the file as typed: which keys there are and what kind of value each takes.
//!
//! Reading refuses unknown and repeated keys and wrong kinds, and goes on after each, so that all are
//! reported together. What the values mean, and their defaults, is `resolve`'s business.

use super::expand::expand;
use super::nearest::nearest;
use super::problems::{PROBLEMS_MAX, Problem};
use super::tree::{self, Key, Node, NodeId, Value};

/// Declares shapes: a struct with a [`Field`] for each key, its reading, and the table of all keys.
macro_rules! shapes {
    ($($name:ident at $path:literal { $($key:ident: $kind:ty),* $(,)? })*) => {
        $(
            #[derive(Default)]
            pub struct $name { $(pub $key: Field<$kind>),* }

            impl FromNode for $name {
                const MAY_BE_EMPTY: bool = true;

                fn from_node(node: &Node, place: &Place, reader: &mut Reader<'_>) -> Option<Self> {
                    let entries = Entries::of_shape(node, place, &[$(stringify!($key)),*], reader)?;
                    Some(Self { $($key: entries.read(stringify!($key), reader)),* })
                }
            }
        )*

        /// Where each shape stands, and its keys.
        pub const SHAPES: &[(&str, &[&str])] = &[$(($path, &[$(stringify!($key)),*])),*];
    };
}

shapes! {
    Root at "" {
        server: Server, load_balancer: LoadBalancer, timeouts: Timeouts, limits: Limits, auth: Auth,
        models: Models, compat: Compat, tls: Tls, usage: Usage, logging: Logging,
        endpoints: Vec<At<Endpoint>>,
    }
    Server at "server" {
        host: Text, port: Number, workers: Number, queue: Number, queue_timeout: Number,
        max_connections: Number, drain_timeout: Number,
    }
    LoadBalancer at "load_balancer" {
        strategy: Text, session_affinity: bool, circuit_breaker_threshold: Number,
        circuit_breaker_timeout: Number, circuit_breaker_failure_rate_threshold: Number,
        circuit_breaker_minimum_calls: Number, circuit_breaker_window: Number, max_attempts: Number,
    }
    Timeouts at "timeouts" {
        connect: Number, first_byte: Number, idle: Number, heartbeat: Number, head: Number, body: Number,
        keep_alive: Number,
    }
    Limits at "limits" { max_body_bytes: Number, max_buffered_bytes: Number }
    Auth at "auth" { mode: Text, api_key: Text, api_keys: Vec<At<ClientKey>>, protect_admin: bool }
    ClientKey at "auth.api_keys[]" { name: Text, key: Text }
    Models at "models" { sonnet: Text, opus: Text, haiku: Text, map: Pairs }
    Compat at "compat" { mode: Text, strip: Vec<At<Text>> }
    Tls at "tls" { ca_file: Text }
    Usage at "usage" { dir: Text, retention_days: Number }
    Logging at "logging" { level: Text, format: Text }
    Endpoint at "endpoints[]" {
        name: Text, api_base: Text, token: Text, token_file: Text, oauth: OAuth, weight: Number,
        max_concurrent: Number, models: Vec<At<Text>>, limits: EndpointLimits, headers: Pairs,
    }
    EndpointLimits at "endpoints[].limits" {
        input_tokens_per_minute: Number, output_tokens_per_minute: Number, requests_per_hour: Number,
        models: Pairs<ModelLimits>,
    }
    ModelLimits at "endpoints[].limits.models" {
        input_tokens_per_minute: Number, output_tokens_per_minute: Number, requests_per_hour: Number,
    }
    OAuth at "endpoints[].oauth" { client_id: Text, client_secret: Text }
}

/// What became of one key.
#[derive(Default)]
pub enum Field<T> {
    /// The key is not there, or a section that holds nothing.
    #[default]
    Absent,
    /// It is there and wrong, and has been reported: it must not be reported as missing too.
    Faulty,
    /// It is there.
    Given(At<T>),
}

impl<T> Field<T> {
    /// The value, if there is one.
    pub fn given(self) -> Option<At<T>> {
        match self {
            Field::Given(at) => Some(at),
            Field::Absent | Field::Faulty => None,
        }
    }

    /// Where the value stands, if there is one.
    pub fn place(&self) -> Option<&Place> {
        match self {
            Field::Given(at) => Some(&at.place),
            Field::Absent | Field::Faulty => None,
        }
    }

    /// True if the key is not there at all.
    pub fn is_absent(&self) -> bool {
        matches!(self, Field::Absent)
    }
}

impl<T: Default> Field<T> {
    /// The section, or one in which every key is absent.
    pub fn section(self) -> T {
        self.given().map(|at| at.value).unwrap_or_default()
    }
}

/// A value and where it stands.
pub struct At<T> {
    pub value: T,
    pub place: Place,
}

/// Where something stands: the node whose line is told, and the key with its parents.
#[derive(Clone)]
pub struct Place {
    pub id: NodeId,
    pub key: String,
}

/// A text, with its variables expanded.
pub struct Text(pub String);

/// A number. Whole ones may also be written `5.0`.
#[derive(Clone, Copy)]
pub enum Number {
    Whole(i128),
    Fraction(f64),
}

/// A mapping whose keys are the operator's own, in the order of the file.
pub struct Pairs<T = Text>(pub Vec<(At<String>, At<T>)>);

impl<T> Default for Pairs<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

/// Reads a value of its kind from a node; a value of another kind is reported and `None`.
pub trait FromNode: Sized {
    /// A section without content (all its lines commented out) counts as absent; a text or number may not be
    /// so.
    const MAY_BE_EMPTY: bool = false;

    fn from_node(node: &Node, place: &Place, reader: &mut Reader<'_>) -> Option<Self>;
}

impl FromNode for Text {
    fn from_node(node: &Node, place: &Place, reader: &mut Reader<'_>) -> Option<Self> {
        match &node.value {
            Value::Text(text) => reader.expand(text, place).map(Text),
            Value::Null => reader.fault(place, "has no value (write one, or remove the key)"),
            Value::Bool(_) | Value::Whole(_) | Value::Fraction(_) => {
                reader.fault(place, format!("must be a text, not {} (put it in quotes)", node.value.kind()))
            }
            Value::List(_) | Value::Map(_) => reader.fault(
                place,
                format!("must be a text, not {} (a text that holds {{ or [ needs quotes)", node.value.kind()),
            ),
        }
    }
}

impl FromNode for Number {
    fn from_node(node: &Node, place: &Place, reader: &mut Reader<'_>) -> Option<Self> {
        match &node.value {
            Value::Whole(number) => Some(Number::Whole(*number)),
            Value::Fraction(number) => Some(Number::Fraction(*number)),
            Value::Text(text) => {
                let text = reader.expand(text, place)?;
                let whole = text.trim().parse().map(Number::Whole);
                let Ok(number) = whole.or_else(|_| text.trim().parse().map(Number::Fraction)) else {
                    return reader
                        .fault(place, "must be a number, not a text (digits alone, without a unit)");
                };
                Some(number)
            }
            Value::Null => reader.fault(place, "has no value (write one, or remove the key)"),
            other => reader.fault(place, format!("must be a number, not {}", other.kind())),
        }
    }
}

impl FromNode for bool {
    fn from_node(node: &Node, place: &Place, reader: &mut Reader<'_>) -> Option<Self> {
        match &node.value {
            Value::Bool(fact) => Some(*fact),
            Value::Text(text) => match reader.expand(text, place)?.trim() {
                "true" => Some(true),
                "false" => Some(false),
                _ => reader.fault(place, "must be true or false"),
            },
            _ => reader.fault(place, "must be true or false"),
        }
    }
}

impl<T: FromNode> FromNode for Vec<At<T>> {
    const MAY_BE_EMPTY: bool = true;

    fn from_node(node: &Node, place: &Place, reader: &mut Reader<'_>) -> Option<Self> {
        let Value::List(items) = &node.value else {
            let what =
                format!("must be a list (lines that begin with `-`, or [ ]), not {}", node.value.kind());
            return reader.fault(place, what);
        };
        let mut values = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let place = Place { id: item.id, key: format!("{}[{index}]", place.key) };
            if let Some(value) = T::from_node(item, &place, reader) {
                values.push(At { value, place });
            }
        }
        // A list of which nothing is left is wrong, not empty.
        if values.is_empty() && !items.is_empty() { None } else { Some(values) }
    }
}

impl<T: FromNode> FromNode for Pairs<T> {
    const MAY_BE_EMPTY: bool = true;

    fn from_node(node: &Node, place: &Place, reader: &mut Reader<'_>) -> Option<Self> {
        let entries = Entries::of(node, place, reader)?;
        let mut pairs = Vec::new();
        for (key, node) in &entries.list {
            let place = entries.place_of(key);
            if let Some(value) = T::from_node(node, &place, reader) {
                let name = At { value: key.text.clone(), place: place.clone() };
                pairs.push((name, At { value, place }));
            }
        }
        Some(Pairs(pairs))
    }
}

/// The entries of a mapping: each key once, merged ones (`<<: *anchor`) behind the written ones.
struct Entries<'n> {
    list: Vec<(&'n Key, &'n Node)>,
    parent: String,
}

impl<'n> Entries<'n> {
    fn of(node: &'n Node, place: &Place, reader: &mut Reader<'_>) -> Option<Self> {
        let Value::Map(written) = &node.value else {
            let hint = match &node.value {
                Value::Text(text) if text.contains(':') => " (is the space behind a colon missing?)",
                _ => "",
            };
            let what =
                format!("must be a mapping (indented `key: value` lines), not {}{hint}", node.value.kind());
            return reader.fault(place, what);
        };
        if written.len() > ENTRIES_MAX {
            return reader.fault(place, format!("holds more than {ENTRIES_MAX} keys"));
        }
        let mut entries = Self { list: Vec::new(), parent: place.key.clone() };
        for (key, value) in written.iter().filter(|(key, _)| key.text != MERGE) {
            if let Some((first, _)) = entries.list.iter().find(|(other, _)| other.text == key.text) {
                let first = reader.line_words(first.id);
                reader.report(&entries.place_of(key), format!("is given twice, first {first} (remove one)"));
            } else {
                entries.list.push((key, value));
            }
        }
        for (key, value) in written.iter().filter(|(key, _)| key.text == MERGE) {
            entries.merge(key, value, reader);
        }
        Some(entries)
    }

    /// Adds what is not there yet; the first of several merged mappings wins.
    fn merge(&mut self, merge: &Key, value: &'n Node, reader: &mut Reader<'_>) {
        match &value.value {
            Value::Map(merged) => {
                for (key, value) in merged.iter().filter(|(key, _)| key.text != MERGE) {
                    if !self.list.iter().any(|(other, _)| other.text == key.text) {
                        self.list.push((key, value));
                    }
                }
                for (key, value) in merged.iter().filter(|(key, _)| key.text == MERGE) {
                    self.merge(key, value, reader);
                }
            }
            Value::List(maps) if maps.iter().all(|map| matches!(map.value, Value::Map(_))) => {
                maps.iter().for_each(|map| self.merge(merge, map, reader));
            }
            _ => reader.report(&self.place_of(merge), "must name a mapping, or a list of mappings, to merge"),
        }
    }

    /// The entries of a shape; a key it does not have is reported.
    fn of_shape(node: &'n Node, place: &Place, keys: &[&str], reader: &mut Reader<'_>) -> Option<Self> {
        let entries = Self::of(node, place, reader)?;
        for (key, _) in entries.list.iter().filter(|(key, _)| !keys.contains(&key.text.as_str())) {
            let place = Place { id: key.id, key: join(&entries.parent, &shown(&key.text)) };
            reader.report(&place, format!("unknown key ({})", instead_of(&key.text, &entries.parent, keys)));
        }
        Some(entries)
    }

    fn read<T: FromNode>(&self, name: &str, reader: &mut Reader<'_>) -> Field<T> {
        let Some((key, node)) = self.list.iter().find(|(key, _)| key.text == name) else {
            return Field::Absent;
        };
        if T::MAY_BE_EMPTY && matches!(node.value, Value::Null) {
            return Field::Absent;
        }
        let place = self.place_of(key);
        match T::from_node(node, &place, reader) {
            Some(value) => Field::Given(At { value, place }),
            None => Field::Faulty,
        }
    }

    fn place_of(&self, key: &Key) -> Place {
        Place { id: key.id, key: join(&self.parent, &shown(&key.text)) }
    }
}

const MERGE: &str = "<<";
/// Each key is compared with those before it.
const ENTRIES_MAX: usize = 1000;

fn join(parent: &str, key: &str) -> String {
    if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") }
}

/// A key of the file as a message shows it. In `{token:dapi...}` the lack of a space makes the token part of
/// the key, so nothing behind such a sign is shown.
fn shown(key: &str) -> String {
    let head = key.split([':', '=', ' ', '\t', '\n']).next().unwrap_or_default();
    let mut shown: String = head.chars().take(KEY_SHOWN_MAX).flat_map(char::escape_debug).collect();
    if head.len() < key.len() || head.chars().count() > KEY_SHOWN_MAX {
        shown += "...";
    }
    shown
}

const KEY_SHOWN_MAX: usize = 40;

/// What to write instead of an unknown key.
fn instead_of(key: &str, parent: &str, keys: &[&str]) -> String {
    if let Some((name, _)) = key.split_once(':')
        && keys.contains(&name)
    {
        return format!("write a space behind the colon of `{name}:`");
    }
    if let Some(known) = nearest(key, keys.iter().copied()) {
        return format!("did you mean `{known}`?");
    }
    let home =
        SHAPES.iter().find(|(path, keys)| *path != parent && !path.contains('.') && keys.contains(&key));
    match home {
        Some(("", _)) => "it belongs at the top of the file".to_owned(),
        Some((path, _)) => format!("it belongs under `{}`", path.trim_end_matches("[]")),
        None => format!("known here: {}", keys.join(", ")),
    }
}

/// Collects problems on the way through the tree.
pub struct Reader<'a> {
    text: &'a str,
    env: &'a dyn Fn(&str) -> Option<String>,
    pub problems: Vec<Problem>,
    /// Problems beyond [`PROBLEMS_MAX`].
    pub more: usize,
}

impl<'a> Reader<'a> {
    pub fn new(text: &'a str, env: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { text, env, problems: Vec::new(), more: 0 }
    }

    /// Notes that something is wrong at a place.
    pub fn report(&mut self, place: &Place, what: impl Into<String>) {
        if self.problems.len() == PROBLEMS_MAX {
            self.more += 1;
            return;
        }
        let problem =
            Problem { line: tree::line_of(self.text, place.id), key: place.key.clone(), what: what.into() };
        // A mapping used through an alias is read once for each use.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// Notes something that has no line: what is missing altogether, or stands in the environment.
    pub fn report_without_line(&mut self, key: &str, what: impl Into<String>) {
        self.problems.push(Problem { line: None, key: key.to_owned(), what: what.into() });
    }

    /// [`Reader::report`], for the value that is then not there.
    pub fn fault<T>(&mut self, place: &Place, what: impl Into<String>) -> Option<T> {
        self.report(place, what);
        None
    }

    /// A place told within a message.
    pub fn line_words(&self, id: NodeId) -> String {
        match tree::line_of(self.text, id) {
            Some(line) if self.problems.len() < PROBLEMS_MAX => format!("on line {line}"),
            _ => "above".to_owned(),
        }
    }

    /// What a variable of the environment holds; an empty one counts as unset.
    pub fn variable(&self, name: &str) -> Option<String> {
        (self.env)(name).filter(|value| !value.is_empty())
    }

    fn expand(&mut self, text: &str, place: &Place) -> Option<String> {
        match expand(text, self.env) {
            Ok(text) => Some(text),
            Err(what) => self.fault(place, what),
        }
    }
}
