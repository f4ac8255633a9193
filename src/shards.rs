//! A norm over several ranks, each of which holds some of the gradients: what they exchange, how it merges, and who
//! exchanges it.

use crate::abi::{self, MEASURED, REFUSED};
use crate::clip_coef::CANONICAL_NAN;
use crate::cpu::clip_coef::total_of;
use crate::cpu::partial::{Partial, RANGE_FACTOR, RANGE_FACTOR_INVERSE};
use crate::cpu::shards::norm_over_ranks;
use crate::error::{Error, Result};
use crate::fp_env::DefaultFpEnv;
use crate::options::NormType;

/// The norm of the gradients of one rank, before the root: what ranks exchange. Merges by addition, for the infinity
/// norm by maximum.
///
/// ```text
/// bytes    little endian
/// 0..8     sum      f64, not negative; NaN if a gradient is NaN, else infinite if one is
/// 8..16    scale    f64: the rank adds sum * scale^order to the sum over all ranks. For orders 1 and 2 it is 1,
///                   2^600 or 2^-600, and leaves 1 only for f64 gradients; for other orders the largest magnitude;
///                   1 where sum is 0
/// 16..24   order    f64: 1, 2, infinity or p; for infinity, sum is a maximum
/// 24..32   tag      "gclipM_1"; or "gclipR_1" of a rank that cannot take part, and then the rest says nothing
/// ```
///
/// Both back ends make the same bytes of the same list. A rank without gradients has a sum of 0, which changes nothing.
///
/// ```
/// use gradclip::{cpu, Copies, NormPartial, NormType};
/// let (mut here, there) = ([[3.0f32]], [[4.0f32]]); // two ranks
/// let mine = cpu::norm_partial(&here, Copies::One, NormType::L2)?.to_bytes();
/// let other = cpu::norm_partial(&there, Copies::One, NormType::L2)?.to_bytes(); // ... any engine carries them ...
/// let gathered = [NormPartial::from_bytes(&mine)?, NormPartial::from_bytes(&other)?];
/// let total_norm = NormPartial::merge(&gathered)?.total_norm()?;
/// assert_eq!(total_norm, 5.0);
/// cpu::clip_with_norm(&mut here, total_norm, 1.0)?;
/// assert_eq!(here, [[0.6]]);
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct NormPartial(abi::NormPartial);

/// Compares the bytes.
impl PartialEq for NormPartial {
    fn eq(&self, other: &Self) -> bool {
        self.to_bytes() == other.to_bytes()
    }
}

impl NormPartial {
    /// Size of a partial in bytes, the same for every norm and list.
    pub const BYTES: usize = size_of::<abi::NormPartial>();

    /// Of a rank without gradients.
    ///
    /// # Errors
    /// [`Error::InvalidNormType`] for an order that is not positive.
    pub fn empty(norm_type: NormType) -> Result<Self> {
        let clip = crate::ClipNorm::measure_only(norm_type);
        clip.validate_over_ranks()?;
        let norm_type = clip.norm_type;
        Ok(Self::measured(Partial::default(), norm_type))
    }

    /// Of a rank that cannot take part: every rank that merges it gets [`Error::RankFailed`]. For a rank that meets an
    /// error of its own before the exchange, since the others wait for it there.
    #[must_use]
    pub const fn refused() -> Self {
        Self(abi::NormPartial { sum: 0.0, scale: 1.0, order: 0.0, tag: REFUSED })
    }

    /// In the default floating-point environment. Twin: the end of `fold_rank` in `kernels/shards.cu`.
    pub(crate) fn measured(total: Partial, norm_type: NormType) -> Self {
        let sum = if total.sum.is_nan() { CANONICAL_NAN } else { total.sum };
        let scale = if sum == 0.0 { 1.0 } else { total.scale };
        Self(abi::NormPartial { sum, scale, order: norm_type.order(), tag: MEASURED })
    }

    /// The bytes that the type's documentation describes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let abi::NormPartial { sum, scale, order, tag } = self.0;
        let mut bytes = [0; Self::BYTES];
        let words = [sum.to_bits(), scale.to_bits(), order.to_bits(), tag];
        for (place, word) in bytes.chunks_exact_mut(size_of::<u64>()).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The partial that is in these bytes.
    ///
    /// # Errors
    /// [`Error::InvalidPartial`] for another number of bytes, another tag or version of the layout, and values that no
    /// partial has. Memory that nobody has written is neither, so it does not go unnoticed.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let _env = DefaultFpEnv::enter();
        let bytes: &[u8; Self::BYTES] =
            bytes.try_into().map_err(|_| Error::InvalidPartial { reason: "it has to be 32 bytes" })?;
        let word = |index: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[8 * index + i]));
        let float = |index: usize| f64::from_bits(word(index));
        let partial = abi::NormPartial { sum: float(0), scale: float(1), order: float(2), tag: word(3) };
        match partial.tag {
            REFUSED => Ok(Self::refused()),
            MEASURED if !is_valid(&partial) => Err(Error::InvalidPartial { reason: "its values are those of none" }),
            MEASURED => Ok(Self(partial)),
            _ => Err(Error::InvalidPartial { reason: "the tag at its end is not gclipM_1 or gclipR_1" }),
        }
    }

    /// The order of the norm; of a rank that took no part, infinity.
    #[must_use]
    pub fn norm_type(&self) -> NormType {
        let _env = DefaultFpEnv::enter();
        if self.0.tag == MEASURED {
            NormType::from(self.0.order)
        } else {
            NormType::Inf
        }
    }

    /// The partial of all ranks together, from those of each in rank order. What it is of several merged partials can
    /// be merged again: of nodes, then of all nodes; in its last bits the norm depends on how.
    ///
    /// The order of the additions is that of stage 2 (`docs/numerics.md`), with ranks for tiles: it goes by rank alone,
    /// so that all ranks get the same bits.
    ///
    /// # Errors
    /// [`Error::RankFailed`] if a rank could not take part, or measured a norm of another order than rank 0;
    /// [`Error::InvalidPartial`] for none.
    pub fn merge(partials: &[Self]) -> Result<Self> {
        let _env = DefaultFpEnv::enter();
        let Some(Self(first)) = partials.first() else {
            return Err(Error::InvalidPartial { reason: "there is none to merge" });
        };
        for (rank, Self(partial)) in partials.iter().enumerate() {
            if partial.tag != MEASURED {
                return Err(Error::RankFailed { rank, reason: RANK_REFUSED });
            }
            if partial.order != first.order {
                return Err(Error::RankFailed { rank, reason: RANK_OF_OTHER_ORDER });
            }
        }
        let norm_type = NormType::from(first.order);
        let each: Vec<Partial> = partials.iter().map(|Self(of)| Partial { sum: of.sum, scale: of.scale }).collect();
        Ok(Self::measured(total_of(&each, norm_type), norm_type))
    }

    /// The norm: of the rank whose partial it is, or of all that were merged.
    ///
    /// # Errors
    /// [`Error::InvalidPartial`] of a rank that took no part.
    pub fn total_norm(&self) -> Result<f64> {
        let _env = DefaultFpEnv::enter();
        if self.0.tag != MEASURED {
            return Err(Error::InvalidPartial { reason: "it is of a rank that took no part" });
        }
        let total = Partial { sum: self.0.sum, scale: self.0.scale };
        Ok(norm_over_ranks(total, NormType::from(self.0.order)))
    }

    /// Whether no gradient of it is NaN or infinite.
    pub(crate) fn is_finite(&self) -> bool {
        self.0.sum.is_finite()
    }
}

pub(crate) const RANK_REFUSED: &str = "had an error of its own, or what came from it is no partial";
pub(crate) const RANK_OF_OTHER_ORDER: &str = "measured a norm of another order than rank 0";

/// A number of ranks that a call can go over.
pub(crate) fn check_world_size(size: usize) -> Result<u32> {
    let limit = abi::RANK_OF_OTHER_ORDER;
    u32::try_from(size).ok().filter(|size| (1..limit).contains(size)).ok_or_else(|| Error::Exchange {
        reason: format!("the engine says that there are {size} ranks; it has to be 1 or more, and below {limit}"),
    })
}

fn is_valid(partial: &abi::NormPartial) -> bool {
    let abi::NormPartial { sum, scale, order, .. } = *partial;
    let ranges = [1.0, RANGE_FACTOR, RANGE_FACTOR_INVERSE];
    let scaled = match NormType::from(order) {
        NormType::L1 | NormType::L2 | NormType::Rms => ranges.contains(&scale),
        NormType::Inf => scale == 1.0,
        NormType::P(_) => scale > 0.0 && (scale.is_finite() || !sum.is_finite()),
    };
    order > 0.0 && scaled && (sum.is_nan() || sum.to_bits() >> 63 == 0)
}

/// How many ranks list each gradient, so that each parameter is counted once.
///
/// A gradient that `n` ranks hold, all the same, counts with a share of `1 / n` in each: its sum of `|x|^p` is divided
/// by `n`, tile by tile. One that another rank counts is 0: its elements are scaled here, not counted. For the infinity
/// norm, where counting twice does no harm, only 0 matters. A NaN or an Inf counts in any case, so that all ranks see
/// it.
///
/// With an owner for each (1 there, 0 elsewhere) nothing is rounded; a share is rounded where `n` is no power of 2. It
/// is what Megatron's `param_is_not_tensor_parallel_duplicate` selects.
///
/// ```
/// use gradclip::{cpu, Copies, NormPartial, NormType};
/// let grads = [vec![3.0f32, 4.0], vec![12.0]]; // on each of two ranks; the second is replicated
/// let partial = cpu::norm_partial(&grads, &[1, 2], NormType::L2)?;
/// let norm = NormPartial::merge(&[partial, partial])?.total_norm()?; // 2 * 25 + 144
/// assert_eq!(norm, 194f64.sqrt());
/// # Ok::<(), gradclip::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Copies<'a> {
    /// Each gradient is on this rank alone: shards of FSDP and ZeRO, pipeline stages.
    #[default]
    One,
    /// For each gradient of the list, the number of ranks that list it; 0 if another rank counts it.
    Each(&'a [u32]),
}

impl Copies<'_> {
    /// One entry for each tensor.
    pub(crate) fn check(&self, tensors: usize) -> Result<()> {
        match self {
            Self::Each(copies) if copies.len() != tensors => {
                Err(Error::ScopeLength { what: "copies", expected: tensors, got: copies.len() })
            }
            _ => Ok(()),
        }
    }

    /// The entries, unless all are 1.
    pub(crate) fn other_than_one(&self) -> Option<&[u32]> {
        match self {
            Self::Each(copies) if copies.iter().any(|&copies| copies != 1) => Some(copies),
            _ => None,
        }
    }
}

impl<'a> From<&'a [u32]> for Copies<'a> {
    fn from(copies: &'a [u32]) -> Self {
        Self::Each(copies)
    }
}

impl<'a, const N: usize> From<&'a [u32; N]> for Copies<'a> {
    fn from(copies: &'a [u32; N]) -> Self {
        Self::Each(copies)
    }
}

impl<'a> From<&'a Vec<u32>> for Copies<'a> {
    fn from(copies: &'a Vec<u32>) -> Self {
        Self::Each(copies)
    }
}

/// What carries partials between ranks: MPI, gloo, sockets, threads. An engine of the caller's, of which one collective
/// is needed.
#[cfg_attr(
    feature = "cuda",
    doc = "For partials that stay on a GPU it is [`DeviceAllGather`](crate::cuda::DeviceAllGather)."
)]
///
/// ```
/// use gradclip::AllGather;
/// /// One process alone.
/// struct Alone;
/// impl AllGather for Alone {
///     type Error = std::convert::Infallible;
///     fn world_size(&self) -> usize {
///         1
///     }
///     fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> Result<(), Self::Error> {
///         all.copy_from_slice(mine); // rsmpi: world.all_gather_into(mine, all)
///         Ok(())
///     }
/// }
/// let mut grads = [[3.0f32, 4.0]];
/// let report = gradclip::cpu::clip_grad_norm_sharded(&mut grads, gradclip::Copies::One, 1.0, &mut Alone)?;
/// assert_eq!(report.total_norm, 5.0);
/// # Ok::<(), gradclip::Error>(())
/// ```
pub trait AllGather {
    /// Its text becomes that of [`Error::Exchange`].
    type Error: std::fmt::Display;

    /// Number of ranks. The same on all of them.
    fn world_size(&self) -> usize;

    /// Puts `mine` of each rank into `all` of every rank, in rank order, each as long as `mine`. Every rank calls it.
    ///
    /// # Errors
    /// Those of the engine.
    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> std::result::Result<(), Self::Error>;
}
