//! "Did you mean": the known word that a mistyped one is closest to.

/// The candidate a person most likely meant, or `None` if none is close.
///
/// A third of the letters may be wrong; case, and `-` for `_`, do not count.
pub fn nearest<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    let word = normal(word);
    if word.len() > WORD_MAX {
        return None;
    }
    let allowed = (word.len() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (distance(&word, &normal(candidate)), candidate))
        .filter(|&(distance, candidate)| distance <= allowed && distance < candidate.chars().count())
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

/// Longer than every word we know by more than any distance allowed.
const WORD_MAX: usize = 48;

fn normal(word: &str) -> Vec<char> {
    word.chars().map(|c| if c == '-' { '_' } else { c.to_ascii_lowercase() }).collect()
}

/// How many letters must be put in, left out, changed, or swapped with their neighbour.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let changed = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = changed.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_meant() {
        let words = ["api_base", "token", "token_file", "weight", "name", "models", "map"];
        for (word, expected) in [
            ("tokn", Some("token")),
            ("toekn", Some("token")),
            ("TokenFile", Some("token_file")),
            ("api-base", Some("api_base")),
            ("apibase", Some("api_base")),
            ("wieght", Some("weight")),
            ("nmae", Some("name")),
            ("mpa", Some("map")),
            ("model", Some("models")),
            ("x", None),
            ("", None),
            ("url", None),
            ("password", None),
        ] {
            assert_eq!(nearest(word, words), expected, "for {word:?}");
        }
        assert_eq!(nearest(&"token".repeat(1000), words), None);
    }
}
