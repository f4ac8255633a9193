//! Which of the caller's variables the tensors of a list belong to: those without a gradient, and those that share
//! another's, are not in the list.

use crate::error::Error;

/// For each tensor of a list, the index of its variable.
#[derive(Clone, Debug, Default)]
pub(crate) struct Variables(Vec<usize>);

impl Variables {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    /// The next tensor of the list belongs to `variable`.
    pub(crate) fn push(&mut self, variable: usize) {
        self.0.push(variable);
    }

    pub(crate) fn name(&self, tensor: usize) -> usize {
        self.0.get(tensor).copied().unwrap_or(tensor)
    }

    /// A list with a place for each of `count` variables: those that have no tensor in the list have `nothing` there.
    pub(crate) fn spread<T: Clone>(&self, count: usize, nothing: T, tensors: impl IntoIterator<Item = T>) -> Vec<T> {
        let mut spread = vec![nothing; count];
        for (tensor, &variable) in tensors.into_iter().zip(&self.0) {
            spread[variable] = tensor;
        }
        spread
    }

    /// The same error, with indices of variables.
    pub(crate) fn name_in(&self, error: Error) -> Error {
        error.rename_tensors(|tensor| self.name(tensor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_of_an_error_becomes_that_of_the_variable() {
        let mut variables = Variables::default();
        variables.push(3);
        variables.push(8);
        let (first, second) = (0, 1);
        assert_eq!(variables.name_in(Error::Overlap { first, second }), Error::Overlap { first: 3, second: 8 });
        let non_finite = |tensor| Error::NonFinite { total_norm: f64::INFINITY, tensor };
        assert_eq!(variables.name_in(non_finite(Some(1))), non_finite(Some(8)));
        assert_eq!(variables.name_in(non_finite(None)), non_finite(None));
        let large = |tensor| Error::TooLarge { tensor, numel: 1 };
        assert_eq!(variables.name_in(large(0)), large(3));
        let text = variables.name_in(Error::UnsupportedDtype { tensor: 1, got: "u8".into() }).to_string();
        assert!(text.starts_with("tensor 8 "), "{text}");
        assert_eq!(variables.name_in(Error::ReportExpired), Error::ReportExpired);
    }
}
