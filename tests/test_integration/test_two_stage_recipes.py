"""Recipes of detectors with proposals, run on a few small images."""

import pytest
from support.recipe_tests import RecipeTests
from support.small_recipe import list_detectors


@pytest.mark.parametrize('name', list_detectors(2), scope='class')
class TestTwoStageDetection(RecipeTests):
    toolbox = 'mmdet'

    def test_metrics(self, run):
        assert 'val/coco/bbox_mAP' in run.scalars
        masks = 'val/coco/segm_mAP' in run.scalars
        assert masks == run.name.startswith('mask')
