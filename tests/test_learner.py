"Weights, heads and groups of real architectures"
import copy
from functools import partial
import pytest, timm, torch
from fastai.losses import (
    BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat
)
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import squeezenet1_1
from fgvc_fisher.learner import (
    aircraft_learner, aircraft_splitter, head_names, load_weights, n_outputs, picture_stats, remake_head, source_dl,
    source_model
)
from fgvc_fisher.data import aircraft_dls
from fgvc_fisher.data.transforms import MixedCrossEntropy
from conftest import mobilenet

@pytest.mark.parametrize('wrong', ['path', 'loader', 'none'])
def test_what_is_no_dataloaders(wrong, drawn):
    dls = dict(path=drawn, loader=aircraft_dls(drawn, size=32, num_workers=0).train, none=None)[wrong]
    with pytest.raises(ValueError, match='dls: DataLoaders.*aircraft_dls'): aircraft_learner(dls, 'test_resnet')

def test_weights_of_another_architecture(tmp_path):
    save_file(timm.create_model('test_efficientnet').state_dict(), tmp_path/'e.safetensors')
    with pytest.raises(ValueError, match='e.safetensors.*ResNet.*bn1.bias.*blocks.0.0'):
        source_model('test_resnet', tmp_path/'e.safetensors')
    save_file(timm.create_model('test_resnet', num_classes=7).state_dict(), tmp_path/'r.safetensors')
    with pytest.raises(ValueError, match=r'fc.bias \(7,\).*\(1000,\)'):
        load_weights(timm.create_model('test_resnet'), tmp_path/'r.safetensors')
    # the file determines the number of classes
    model = source_model('test_resnet', tmp_path/'r.safetensors')
    assert model.num_classes==7 and torch.equal(model.fc.weight, load_file(tmp_path/'r.safetensors')['fc.weight'])

@pytest.mark.parametrize('name', ['junk.safetensors', 'junk.pth'])
def test_a_file_that_cannot_be_loaded(name, tmp_path):
    (tmp_path/name).write_bytes(b'this is a page that says 404')
    with pytest.raises(ValueError, match=name): source_model('test_resnet', tmp_path/name)

@pytest.mark.parametrize('arch,said',
    [('os:getcwd', 'str'), ('os:nothing', 'nothing'), ('nowhere.at.all:f', 'nowhere')])
def test_a_function_that_makes_no_network(arch, said):
    with pytest.raises(ValueError, match=f'{arch}.*{said}'): source_model(arch, weights=None)

def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.safetensors'):
        source_model('test_resnet', tmp_path/'none.safetensors')

@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'state_dict': s, 'epoch': 3}])
def test_state_dict_of_pytorch_without_counters(tmp_path, wrap):
    model = timm.create_model('test_resnet')
    torch.save(wrap({k: v for k,v in model.state_dict().items() if 'num_batches_tracked' not in k}), tmp_path/'w.pth')
    again = source_model('test_resnet', tmp_path/'w.pth')
    assert all(torch.equal(p, q) for p,q in zip(model.parameters(), again.parameters()))

def test_learner_leaves_the_source_alone(drawn):
    source = source_model('test_resnet', weights=None)
    dls = aircraft_dls(drawn, size=32, bs=8, num_workers=0)
    learn = aircraft_learner(dls, source)
    theta0 = dict(source.named_parameters())
    body = {n: p for n,p in learn.model.named_parameters() if not n.startswith('fc.')}
    assert all(torch.equal(p, theta0[n]) for n,p in body.items())
    before = {k: v.clone() for k,v in source.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.1)
    assert all(torch.equal(v, before[k]) for k,v in source.state_dict().items())

MODELS = [mobilenet, squeezenet1_1, *(partial(timm.create_model, o) for o in ('test_vit','test_convnext'))]

@pytest.mark.parametrize('make', MODELS)
def test_every_parameter_is_in_one_group(make):
    model = remake_head(make(), 5)
    groups = aircraft_splitter(model)
    assert [id(p) for g in groups for p in g]==[id(p) for p in model.parameters()]
    assert sum(p.numel() for p in groups[-1]) % 5==0 and len(groups)==2

def test_inception_v4_has_the_papers_groups():
    with torch.device('meta'): model = timm.create_model('inception_v4', num_classes=105)
    groups = aircraft_splitter(model)
    assert [sum(p.numel() for p in g) for g in groups][-1]==1536*105+105 and len(groups)==3
    assert sum(p.numel() for g in groups for p in g)==41_304_201

# The kinds of heads in timm: `get_classifier` returns a layer, a module with more than one, a list or a tuple
HEADS = dict(
    test_resnet=['fc'], test_vit=['head'], test_convnext=['head.fc'], test_efficientnet=['classifier'],
    vgg11=['head'], legacy_seresnet18=['last_linear'], dpn68=['classifier'], resnet50_clip=['head.proj'],
    caformer_s18=['head.fc'], inception_next_tiny=['head.fc2'], efficientvit_b0=['head.classifier.4'],
    efficientvit_m0=['head'], volo_d1_224=['aux_head','head'], crossvit_9_240=['head'])
HEADS |= {arch: ['head','head_dist'] for arch in (
    'levit_128s', 'deit_tiny_distilled_patch16_224', 'efficientformer_l1')}

@pytest.mark.parametrize('arch', HEADS)
def test_the_head_is_what_is_new(arch):
    with torch.device('meta'): model = timm.create_model(arch)
    assert head_names(model)==HEADS[arch] and n_outputs(model)==model.num_classes
    old = list(model.parameters())
    body = {id(p) for p in old}
    before = torch.get_rng_state()
    assert head_names(torch.compile(model))==HEADS[arch]                     # draws no random numbers
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device('meta'): remake_head(model, 5)
    *others,head = aircraft_splitter(model)
    assert head and body.isdisjoint(map(id, head)) and all(id(p) in body for group in others for p in group)
    assert head_names(model)==HEADS[arch] and n_outputs(model)==5
    assert sum(map(len, others))+len(head)==len(list(model.parameters()))

@pytest.mark.parametrize('arch', HEADS)
def test_the_head_of_a_network_without_outputs(arch):
    with torch.device('meta'):
        model = timm.create_model(arch, num_classes=0)
        assert n_outputs(remake_head(model, 5))==5

@pytest.mark.parametrize('arch', ['deit_tiny_distilled_patch16_224', 'levit_128s'])
def test_freezing_trains_both_heads(arch, drawn):
    dls = aircraft_dls(drawn, size=224, bs=2, num_workers=0, fraction=0.25)
    learn = aircraft_learner(dls, arch, weights=None, train_bn=False)
    before = copy.deepcopy(learn.model)
    learn.freeze()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.1)
    changed = {n for n,p in learn.model.named_parameters() if not torch.equal(p.cpu(), before.get_parameter(n).cpu())}
    assert {n.split('.')[0] for n in changed}=={'head','head_dist'}

def test_no_head():
    with pytest.raises(ValueError, match='ReLU'): remake_head(nn.ReLU(), 3)

# What a Learner needs is checked when it is made

def published(tree, **kw): return aircraft_dls(tree, size=32, bs=4, num_workers=0, transforms='published', **kw)

class Soft(nn.Module):
    "A loss for mixed targets only"
    def forward(self, logits, targets): return -(targets*logits.log_softmax(1)).sum(1).mean()

REFUSED = dict(flat=CrossEntropyLossFlat(), weighted=CrossEntropyLossFlat(weight=torch.ones(4)),
    smoothed=LabelSmoothingCrossEntropyFlat(), unflat=LabelSmoothingCrossEntropy(), focal=FocalLossFlat(), soft=Soft(),
    bce=BCEWithLogitsLossFlat(), mse=nn.MSELoss(), wrong_weights=nn.CrossEntropyLoss(weight=torch.ones(7)),
    nll=nn.functional.nll_loss, partial=partial(nn.functional.nll_loss, reduction='sum'))
@pytest.mark.parametrize('loss', REFUSED)
def test_a_loss_that_cannot_mix(loss, drawn):
    with pytest.raises(ValueError, match="published.*MixedCrossEntropy"):
        aircraft_learner(published(drawn), 'test_resnet', None, loss_func=REFUSED[loss])
    with pytest.raises(ValueError, match=type(Soft()).__name__):
        aircraft_learner(published(drawn), 'test_resnet', None, loss_func=Soft())

TAKEN = dict(default=None, own=MixedCrossEntropy(), weighted=MixedCrossEntropy(weight=torch.tensor([1.,2.,3.,4.])),
    torch=nn.CrossEntropyLoss(weight=torch.tensor([1.,2.,3.,4.])), smoothed=nn.CrossEntropyLoss(label_smoothing=0.1),
    function=nn.functional.cross_entropy)
@pytest.mark.parametrize('loss', TAKEN)
def test_a_loss_that_mixes(loss, drawn):
    learn = aircraft_learner(published(drawn), 'test_resnet', None, loss_func=TAKEN[loss])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    assert torch.tensor(learn.recorder.values[-1][:2]).isfinite().all()

@pytest.mark.parametrize('loss', ['flat', 'weighted', 'smoothed', 'focal'])
def test_any_loss_without_mixing(loss, drawn):
    dls = aircraft_dls(drawn, size=32, bs=4, num_workers=0)
    learn = aircraft_learner(dls, 'test_resnet', None, loss_func=REFUSED[loss])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    assert learn.loss_func is REFUSED[loss] and torch.tensor(learn.recorder.values[-1][:2]).isfinite().all()

@pytest.mark.parametrize('arch,channels', dict(test_resnet=1, test_vit=1, test_efficientnet=4, test_mambaout=6).items())
def test_other_channels_are_refused(arch, channels, drawn, drawn_source):
    model = timm.create_model(arch, in_chans=channels)
    with pytest.raises(ValueError, match=f'{type(model).__name__}.*{channels} channels.*in_chans=3'):
        aircraft_learner(aircraft_dls(drawn, size=32, bs=4, num_workers=0), model)
    with pytest.raises(ValueError, match=f'{channels} channels'): source_dl(drawn_source, model, 32, num_workers=0)

class Squeezed(nn.Module):
    "Makes grey pictures before its first convolution"
    def __init__(self):
        super().__init__()
        self.conv,self.fc = nn.Conv2d(1, 4, 3),nn.Linear(4, 9)
    def forward(self, x): return self.fc(self.conv(x.mean(1, keepdim=True)).mean((2,3)))
@pytest.mark.parametrize('make', [Squeezed, partial(timm.create_model, 'tresnet_m'),
                                  lambda: nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 9))])
def test_three_channels_however_they_are_used(make, drawn):
    dls = aircraft_dls(drawn, size=32, bs=4, num_workers=0)
    x = torch.randn(2, 3, 32, 32, device=dls.device)
    assert aircraft_learner(dls, make()).model.to(dls.device).eval()(x).shape==(2, len(dls.vocab))

@pytest.mark.parametrize('cfg', [None, {}, dict(input_size=(3,32,32)), dict(mean=None, std=None), 'deleted'])
def test_without_a_complete_cfg(cfg, drawn):
    model = timm.create_model('test_resnet')
    if cfg=='deleted': del model.pretrained_cfg
    else: model.pretrained_cfg = cfg
    learn = aircraft_learner(aircraft_dls(drawn, size=32, bs=4, num_workers=0), model)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    assert picture_stats(model)['mean']==(0.485, 0.456, 0.406)

# A copy of a module in any state

def keeps_a_graph(model):
    model.eval()(torch.randn(1, 3, 224, 224))
    with pytest.raises(RuntimeError, match='deepcopy'): copy.deepcopy(model)
    return model
def keeps_a_list():
    model = timm.create_model('test_resnet')
    model.seen = [dict(x=model.fc.weight*2)]
    return model
def weight_normed():
    model = timm.create_model('test_resnet')
    nn.utils.weight_norm(model.fc)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    return model
KEEPERS = dict(levit=lambda: keeps_a_graph(timm.create_model('levit_128s')), a_list=keeps_a_list)
@pytest.mark.parametrize('kind', KEEPERS)
def test_a_model_that_keeps_its_graph(kind, drawn):
    model = KEEPERS[kind]()
    source = source_model(model)
    x = torch.randn(2, 3, 224, 224)
    assert torch.equal(source(x), model.eval()(x))
    learn = aircraft_learner(aircraft_dls(drawn, size=224, bs=2, num_workers=0, fraction=0.25), model)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    learn.model.cpu().eval()
    theirs = {n: p for n,p in source.named_parameters() if n in dict(learn.model.named_parameters())}
    assert any(not torch.equal(p, learn.model.get_parameter(n)) for n,p in theirs.items())

def test_a_copy_computes_with_its_own_weights():
    model = keeps_a_graph(timm.create_model('levit_128s'))
    source = source_model(model)
    biases = [p for n,p in source.named_parameters() if 'attention_biases' in n]
    for p in biases: nn.init.normal_(p)
    x = torch.randn(1, 3, 224, 224)
    assert not torch.equal(source(x), model(x))
    source(x).sum().backward()
    assert any(p.grad.any() for p in biases)

def test_weight_norm_can_be_copied():
    model = weight_normed()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(source_model(model)(x), model.eval()(x))

@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.compile])
def test_a_wrapped_source(wrap, drawn):
    model = timm.create_model('test_resnet')
    source = source_model(wrap(model))
    assert list(source.state_dict())==list(model.state_dict()) and source is not model
    learn = aircraft_learner(aircraft_dls(drawn, size=32, bs=4, num_workers=0), wrap(model))
    assert learn.model.num_classes==learn.dls.c and model.num_classes==1000
    groups = aircraft_splitter(nn.DataParallel(learn.model))
    assert [len(g) for g in groups]==[len(g) for g in aircraft_splitter(learn.model)]

def test_weights_are_used_by_a_model_that_has_kept_others(tmp_path):
    "LeViT keeps the attention biases of an earlier pass"
    new = timm.create_model('levit_128s').eval()
    for n,p in new.named_parameters():
        if 'attention_biases' in n: nn.init.normal_(p)
    save_file(new.state_dict(), tmp_path/'w.safetensors')
    model = timm.create_model('levit_128s').eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        model(x)
        assert torch.equal(load_weights(model, tmp_path/'w.safetensors')(x), new(x)) and not model.training

def test_a_head_of_which_a_new_one_has_less(tmp_path):
    "RepViT's second head goes when its classifier is made anew: such a model can be read again"
    tuned = remake_head(timm.create_model('repvit_m0_9', num_classes=10), 4)
    save_file(tuned.state_dict(), tmp_path/'a.safetensors')
    again = source_model('repvit_m0_9', tmp_path/'a.safetensors')
    assert n_outputs(again)==4 and again.state_dict().keys()==tuned.state_dict().keys()
